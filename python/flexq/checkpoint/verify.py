"""Checking that a checkpoint is what was written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexq import ops
from flexq.checkpoint.keys import compare, shapes_of
from flexq.checkpoint.layers import insert_layers, read_plan
from flexq.checkpoint.source import (
    CheckpointError,
    ModelError,
    ModelSource,
    Weights,
    load_config,
    one_line,
    opened,
    skeleton,
)
from flexq.checksum import CHECKSUMS, checksum
from flexq.plan import Plan
from flexq.quantize.layers import identities

# In a safetensors file's metadata: the plan's fingerprint.
PLAN_HASH = "flexq.plan"


@dataclass
class Verified:
    """What of a checkpoint was checked, and found right.

    Args:
        files, tensors: how many there are.
        with_checksum: tensors that have a checksum.
        plan_is_bound: the files say which plan they belong to.
        keys: the model has a place for every tensor, and a tensor for every place.
    """

    files: int = 0
    tensors: int = 0
    with_checksum: int = 0
    plan_is_bound: bool = False
    keys: bool = False

    def __str__(self) -> str:
        if self.with_checksum == self.tensors:
            sums = f"checksums of all {self.tensors} tensors"
        else:
            sums = f"checksums of {self.with_checksum} of {self.tensors} tensors (the others have none)"
        plan = "the plan's hash" if self.plan_is_bound else "no hash of the plan (the files have none)"
        keys = ["names and shapes of all tensors"] if self.keys else []
        return ", ".join([sums, plan, *keys, "scales"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: str | Path) -> Verified:
    """Check a FlexQ checkpoint: files, and that they fit the model that its config describes. No weight is loaded.

    Checksums are against damage, not against people: whoever changes a tensor can change its checksum.

    Raises:
        CheckpointError: naming the file and tensor.
    """
    folder = Path(folder)
    verified, shapes = _check_files(folder)
    try:
        _require_fit(folder, str(folder), shapes)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from None
    verified.keys = True
    return verified


def _require_fit(folder: Path, of: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where the tensors are not those of the model that the config describes."""
    source = ModelSource(of, str(folder))
    model = skeleton(source, load_config(source))
    insert_layers(model, read_plan(folder))
    compare(model, shapes).require_none(of)


def require_loadable(folder: Path, of: str) -> None:
    """A checkpoint that was just made of `of`: the model that its config describes has a place for each of its tensors,
    and a tensor for each place. Reads headers alone.

    Raises:
        ModelError: it could not be loaded.
    """
    try:
        _require_fit(folder, of, shapes_of(Weights.of(folder).files))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"what was made of {of} could not be loaded, and is not kept: {one_line(error)}") from None


def verify_files(folder: str | Path) -> Verified:
    """The same without a look at the model's class: what is in the files is as it was written, and is what index and
    plan say. Loading then compares names and shapes with the model's."""
    return _check_files(Path(folder))[0]


def _check_files(folder: Path) -> tuple[Verified, dict[str, tuple[int, ...]]]:
    plan = read_plan(folder)
    try:
        weights = Weights.of(folder)
    except CheckpointError:
        raise
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    verified = Verified(files=len(weights.files))
    names: dict[Path, set[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    hashes: set[str | None] = set()
    for file in weights.files:
        with opened(file) as handle:
            metadata = handle.metadata() or {}
            names[file] = set(handle.keys())
            hashes.add(metadata.get(PLAN_HASH))
            checksums = _checksums_of(file, metadata, names[file])
            for name in sorted(names[file]):
                if name in shapes:
                    raise CheckpointError(f"{file.name}: tensor {name} is in another file too")
                part = handle.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if checksums is None and not name.endswith(".scales"):
                    continue
                tensor = handle.get_tensor(name)
                if checksums is not None and checksum(tensor) != checksums[name]:
                    raise CheckpointError(f"{file.name}: tensor {name} has changed since it was written")
                verified.with_checksum += checksums is not None
                if name.endswith(".scales"):
                    _check_scales(name, tensor)
    weights.check_index(names)
    verified.tensors = len(shapes)
    verified.plan_is_bound = check_plan_hash(plan, hashes, folder)
    _check_layers(folder, plan, shapes)
    return verified, shapes


def _checksums_of(file: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, int] | None:
    """A file's checksums; None for one that has none, as transformers' `save_pretrained` writes them."""
    if CHECKSUMS not in metadata:
        return None
    try:
        checksums = json.loads(metadata[CHECKSUMS])
        if not isinstance(checksums, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file.name}: its checksums cannot be read") from None
    for name in sorted(set(checksums) ^ names):
        problem = "is missing" if name in checksums else "does not belong there"
        raise CheckpointError(f"{file.name}: tensor {name} {problem}")
    return checksums


def check_plan_hash(plan: Plan, hashes: set[str | None], where: str | Path) -> bool:
    """Whether a checkpoint's files say which plan they belong to; CheckpointError if it is another."""
    for found in hashes - {None}:
        if found != plan.fingerprint():
            raise CheckpointError(
                f"{where}: the plan in config.json is not the one that the tensors were quantized by; restore "
                "config.json, or quantize again with the plan that you want"
            )
    return None not in hashes


def _tied_to(folder: Path, layers: Iterable[str], given: Iterable[str]) -> set[str]:
    """The layers that transformers ties to those which are given."""
    source = ModelSource(str(folder), str(folder))
    try:
        which = identities(skeleton(source, load_config(source)), layers)
    except (ModelError, AttributeError):  # of a class, or with layers, that transformers does not have; or experts
        return set()
    there = {which[name] for name in given}
    return {name for name, weight in which.items() if weight in there}


def _check_scales(name: str, scales: torch.Tensor) -> None:
    if scales.dtype != torch.float16 or scales.dim() not in (2, 3):
        raise CheckpointError(
            f"tensor {name} must be float16 [N, G], or [E, N, G] of experts, got {scales.dtype} {list(scales.shape)}"
        )
    try:
        ops.check_scales(scales.reshape(-1, scales.shape[-1]))
    except ValueError as error:
        raise CheckpointError(f"tensor {name}: {error}") from None


def _check_layers(folder: Path, plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every quantized layer of the plan has its tensors, and the reverse. Files may name it with another prefix, and
    hold one for all that are tied to each other."""
    layers = {name: config for name, config in plan.layers.items() if config is not None}
    on_disk = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if len(on_disk) != len(layers) and set(on_disk) <= set(layers):
        there = {*on_disk, *_tied_to(folder, layers, on_disk)}
        if missing := next((name for name in layers if name not in there), None):
            raise CheckpointError(f"tensor {missing}.qweight is missing from the checkpoint")
    if len(on_disk) > len(layers):
        extra = next((name for name in on_disk if name not in layers), on_disk[0])
        raise CheckpointError(f"tensor {extra}.qweight is of no layer that the plan quantizes")
    for name in on_disk:
        shape, scales = shapes[f"{name}.qweight"], shapes.get(f"{name}.scales")
        if scales is None:
            raise CheckpointError(f"tensor {name}.scales is missing from the checkpoint")
        config, (*rows, whole_groups) = layers.get(name), shape[:-2]
        widths = ops.WEIGHT_BITS if config is None else (config.weight_bits,)
        if len(shape) not in (4, 5) or shape[-2] not in widths or shape[-1] != 16:
            b = widths[0] if len(widths) == 1 else "b"
            raise CheckpointError(
                f"tensor {name}.qweight must be uint8 [N, G, {b}, 16], or [E, N, G, {b}, 16] of experts, got "
                f"{list(shape)}"
            )
        groups = {whole_groups, 1} if config is None else {whole_groups if config.scheme == "group" else 1}
        if scales not in {(*rows, g) for g in groups}:
            expected = " or ".join(str([*rows, g]) for g in sorted(groups))
            raise CheckpointError(f"tensor {name}.scales must be float16 {expected}, got {list(scales)}")
