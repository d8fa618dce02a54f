"""Opening a folder of safetensors as a model whose weights stay in its files."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from flexq.checkpoint.keys import Target, compare, dtype_of, made_of, remember_conversions, shapes_of, targets_of
from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    Reader,
    Weights,
    load_config,
    read_tensor,
    skeleton,
)
from flexq.quantize.offload import Offloaded


def open_offloaded(source: ModelSource, device: torch.device | str, folder: Path | None = None):
    """A model of transformers on the meta device, and its `Offloaded`.

    Args:
        source: of a folder of safetensors, not quantized.
        device: where what comes from the files goes.
        folder: of `Offloaded`.

    Raises:
        ModelError: it is no such folder, or lacks tensors.
    """
    if source.folder is None:
        raise ModelError(
            f"{source.name} is not a folder of safetensors, from which weights can be read a block at a time; load it "
            "whole, or save it with save_pretrained first"
        )
    config = load_config(source)
    weights = Weights.of(source.folder)
    dtype = config.dtype or _first_dtype(weights)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with _default_dtype(dtype):
        model = skeleton(source, config)
    _require_all(source, model, weights)
    _make_buffers(model)
    tensors = _Tensors(source, model, weights, dtype)
    if (source.folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval(), Offloaded(model, tensors.read, device, folder)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_dtype(weights: Weights) -> torch.dtype:
    """Of the first tensor that has floating point."""
    for file, name in weights.tensors():
        dtype = read_tensor(file, name).dtype
        if dtype.is_floating_point:
            return dtype
    raise ModelError(f"{weights.folder} holds no tensor in floating point")


def _require_all(source: ModelSource, model: nn.Module, weights: Weights) -> None:
    """ModelError where files lack a tensor of the model, or have it in another shape."""
    found = compare(model, shapes_of(weights.files))
    found.unexpected = []
    found.require_none(source.name)


def _make_buffers(model: nn.Module) -> None:
    """Buffers that files do not have, such as frequencies of rotary embeddings, as transformers makes them."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = torch.empty_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


class _Tensors:
    """Reads tensors of a model's `state_dict` from the files of its folder."""

    def __init__(self, source: ModelSource, model: nn.Module, weights: Weights, dtype: torch.dtype):
        self._model, self._dtype = model, dtype
        self._files = {name: file for file, name in weights.tensors()}
        self._state = model.state_dict(keep_vars=True)
        self._parts: dict[str, tuple[Target, list[str]]] = {}
        for name, target in targets_of(model, self._files).items():
            if target is None:
                continue
            for made in target.names:
                self._parts.setdefault(made, (target, []))[1].append(name)
        remember_conversions(model, self._files)
        self._untie()

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        with contextlib.closing(Reader()) as read:
            return {key: self._one(key, read) for key in keys}

    def _one(self, key: str, read: Reader) -> torch.Tensor:
        key = self._known_as(key)
        target, names = self._parts[key]
        reading = [(name, functools.partial(read, self._files[name], name)) for name in names]
        tensor = made_of(self._model, target, reading)[key] if target.is_part else reading[0][1]()
        return tensor.to(dtype_of(self._model, key, self._dtype)) if tensor.is_floating_point() else tensor

    def _known_as(self, key: str) -> str:
        """The name of a tensor that files have: its own, or that of one it is tied to."""
        if key in self._parts:
            return key
        for other, tensor in self._state.items():
            if tensor is self._state[key] and other in self._parts:
                return other
        raise ModelError(f"no file has tensor {key}, which transformers computes; load the model whole")

    def _untie(self) -> None:
        """A tensor that the configuration says is tied to another, while files have both and they differ."""
        for name, other in list(self._model.all_tied_weights_keys.items()):
            if name in self._parts and other in self._parts and not torch.equal(*self.read([name, other]).values()):
                parent, _, own = name.rpartition(".")
                empty = torch.empty_like(self._state[name], device="meta")
                setattr(self._model.get_submodule(parent), own, nn.Parameter(empty, requires_grad=False))
                del self._model.all_tied_weights_keys[name]
