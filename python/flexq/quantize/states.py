"""Where hidden states wait while other blocks are worked on: in the host's memory, or in files."""

import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class OnHost(MutableMapping[Hashable, torch.Tensor]):
    """Tensors in the host's memory, which come to a device when they are asked for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._held: dict[Hashable, torch.Tensor] = {}

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        self._held[key] = tensor.detach().to("cpu")

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return self._held[key].to(self._device)

    def __delitem__(self, key: Hashable) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class InFiles(MutableMapping[Hashable, torch.Tensor]):
    """Tensors in files of a temporary folder, a file each; the folder goes when this does.

    Args:
        device: where they come to when they are asked for.
        folder: where the temporary folder is made.
    """

    def __init__(self, device: torch.device, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._device = device
        self._folder = tempfile.TemporaryDirectory(prefix="hidden-states-", dir=folder)
        self._files: dict[Hashable, Path] = {}

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        file = self._files.setdefault(key, Path(self._folder.name) / f"{len(self._files)}.safetensors")
        try:
            save_file({"state": tensor.detach().to("cpu").contiguous()}, file)
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from None

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        state = load_file(self._files[key])["state"]
        return state.clone() if self._device.type == "cpu" else state.to(self._device)

    def __delitem__(self, key: Hashable) -> None:
        self._files.pop(key).unlink()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
