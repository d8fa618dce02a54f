"""The blocks that a calibration has finished, in files: to go on from, and to make a checkpoint of."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexq.checksum import CHECKSUMS, checksum
from flexq.experts import ExpertWeights
from flexq.linear import Linear
from flexq.plan import LayerConfig

_BLOCK = "block"  # files are named so, and numbered
_NOTE = "calibration.json"  # which calibration they are of
_SUMMED = 1 << 24  # values of a tensor at a time


def require_own(folder: Path) -> None:
    """ValueError for a folder that holds something else than a calibration's blocks."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a calibration goes on in a folder of its own")
    others = folder.is_dir() and any(file.suffix != ".part" for file in folder.iterdir())
    if others and not (folder / _NOTE).exists():
        raise ValueError(f"{folder} holds other files; a calibration goes on in a folder of its own, which may be new")


class Finished:
    """The blocks that an interrupted calibration has finished, a file each, in a folder of its own.

    Each file has checksums of its tensors and says which calibration it is of; a damaged or foreign one counts as
    absent, so that its block is calibrated again.
    """

    _CALIBRATION, _EXPERTS = "flexq.calibration", "flexq.experts"

    def __init__(self, folder: str | Path | None, about: dict[str, Any]):
        self.folder, self.about = None if folder is None else Path(folder), json.dumps(about, sort_keys=True)
        if self.folder is None:
            return
        require_own(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / _NOTE
        if not note.exists():
            _write_whole(note, lambda file: file.write_text(json.dumps(about, indent=2) + "\n"))
            return
        try:
            same = json.loads(note.read_text()) == about
        except (ValueError, RecursionError):
            same = False
        if not same:
            raise ValueError(f"{folder} belongs to another calibration: other text, plan or weights; use a new folder")

    def _file(self, block: int) -> Path:
        return self.folder / f"{_BLOCK}-{block:04}.safetensors"

    def load(self, block: int, layers: Sequence[str]) -> tuple[dict[str, torch.Tensor], Counter] | None:
        """A block's canonical tensors, and how its experts were rounded, if its file is there and sound."""
        if self.folder is None or not self._file(block).exists():
            return None
        wanted = {f"{name}.{tensor}" for name in layers for tensor in ("qweight", "scales")}
        try:
            with safe_open(self._file(block), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksums = json.loads(metadata.get(CHECKSUMS, "{}"))
            experts = Counter(json.loads(metadata.get(self._EXPERTS, "{}")))
        except (OSError, SafetensorError, ValueError, RecursionError):
            return None
        sound = metadata.get(self._CALIBRATION) == self.about and set(tensors) == wanted
        return (tensors, experts) if sound and checksums == {n: checksum(t) for n, t in tensors.items()} else None

    def save(self, block: int, layers: dict[str, Linear | ExpertWeights], experts: Counter) -> None:
        if self.folder is None:
            return
        tensors = {}
        for name, layer in layers.items():
            planes, scales = layer.canonical()
            tensors |= {f"{name}.qweight": planes.cpu().contiguous(), f"{name}.scales": scales.cpu().contiguous()}
        checksums = json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})
        metadata = {CHECKSUMS: checksums, self._CALIBRATION: self.about}
        if experts:
            metadata[self._EXPERTS] = json.dumps(experts)
        _write_whole(self._file(block), lambda file: save_file(tensors, file, metadata=metadata))


def _write_whole(file: Path, write) -> None:
    """Write a file that is whole or not there."""
    aside = file.with_suffix(".part")
    try:
        write(aside)
        os.replace(aside, file)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from None


def fingerprint(
    tensors: Iterable[torch.Tensor], windows: Sequence[torch.Tensor], resolved: dict[str, LayerConfig], **settings: Any
) -> dict[str, Any]:
    """What decides a calibration's outcome: the text, the plan, every tensor of the model, how rounding is done."""
    text = zlib.crc32(torch.cat([w.flatten().cpu() for w in windows]).numpy().tobytes())
    sums = []
    for tensor in tensors:
        for part in tensor.detach().flatten().split(_SUMMED):
            values = part.double()
            sums += [values.sum().item(), values.abs().sum().item()]
    return {
        "text": text,
        "windows": [len(windows), windows[0].shape[-1]],
        "plan": zlib.crc32(repr(sorted(resolved.items())).encode()),
        "weights": zlib.crc32(torch.tensor(sums, dtype=torch.float64).numpy().tobytes()),
        **settings,
    }


def finished_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a calibration's finished blocks, `<layer>.qweight` and `<layer>.scales`."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob(f"{_BLOCK}-*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            files |= dict.fromkeys(handle.keys(), file)
    return files
