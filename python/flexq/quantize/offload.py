"""A model whose weights are in files: a block's are in memory while it is worked on, and no other's."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq.packed import PackedModule
from flexq.quantize.blocks import Stack, block_lists, is_replaced, on_device
from flexq.quantize.experts import module_of
from flexq.quantize.layers import identity, input_embeddings
from flexq.quantize.placement import Placement
from flexq.quantize.states import InFiles, OnHost

# Parts outside blocks that are no larger are always there.
_SMALL_BYTES = 16 << 20
_IN_MEMORY = "it can be calibrated only in memory, by flexq.calibrate_model"

Reader = Callable[[Sequence[str]], dict[str, torch.Tensor]]
"""Tensors of a model's `state_dict`, by their names there."""
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Slot:
    """A place for a tensor in a module.

    Args:
        module: that the tensor is in.
        name: of its parameter or buffer.
        key: its name in the model's `state_dict`.
        empty: what is there while the tensor is not in memory, on the meta device.
    """

    module: nn.Module
    name: str
    key: str
    empty: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        setattr(self.module, self.name, tensor)

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is there while it is in memory."""
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.empty, nn.Parameter) else tensor


@dataclass(eq=False)
class _Part:
    """What comes into memory and goes again as a whole: a block, or a module that is in none."""

    module: nn.Module
    is_block: bool
    slots: list[_Slot] = field(default_factory=list)

    @property
    def comes_and_goes(self) -> bool:
        if self.is_block:
            return True
        holds_others = any(True for child in self.module.children() for _ in child.parameters())
        return not holds_others and sum(slot.empty.nbytes for slot in self.slots) > _SMALL_BYTES

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.module.modules()) if self.is_block else [self.module]


class Offloaded(Placement):
    """A model on the meta device whose weights come from files, a block's or an embedding's at a time.

    A forward pass of the model runs as if it were in memory: each part is read as it is entered, and gives its place to
    the next one.

    Args:
        model: its parameters, and the buffers that files have, on the meta device; other buffers with their values.
        read: reads tensors.
        device: where they go, and where everything runs.
        folder: where hidden states are kept; None keeps them in memory.
    """

    is_whole, together = False, None

    def __init__(self, model: nn.Module, read: Reader, device: torch.device | str, folder: Path | None = None):
        super().__init__(None)
        self._read, self._on, self._folder = read, torch.device(device), folder
        self._changes: dict[str, list[Change]] = defaultdict(list)
        self._there: _Part | None = None
        for name, buffer in list(model.named_buffers()):
            if not buffer.is_meta:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, buffer.to(self._on))
        parts = _parts_of(model)
        self._places: dict[int, list[_Slot]] = defaultdict(list)  # of each tensor, several if it is tied
        self._keys: dict[tuple[nn.Module, str], str] = {}
        for slot in (slot for part in parts for slot in part.slots):
            self._places[id(slot.empty)].append(slot)
            self._keys[slot.module, slot.name] = slot.key
        staying = [slot for part in parts if not part.comes_and_goes for slot in part.slots]
        self._fill(staying)
        self._staying = {id(slot.empty) for slot in staying}
        coming = [part for part in parts if part.comes_and_goes]
        self._part_of = {module: part for part in coming for module in part.modules}
        model.register_forward_pre_hook(self._take_arguments, with_kwargs=True)
        for part in coming:
            part.module.register_forward_pre_hook(self._enter)

    # ---- Tensors ----

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names in the model's `state_dict`, with the changes made to them, on the CPU."""
        tensors = self._read(keys)
        for key in keys:
            for change in self._changes.get(key, ()):
                tensors[key] = change(tensors[key])
        return tensors

    def _fill(self, slots: Sequence[_Slot]) -> None:
        tensors = self.read([slot.key for slot in slots])
        with torch.inference_mode(False):
            for slot in slots:
                filled = slot.filled(tensors[slot.key].to(self._on))
                for place in self._places[id(slot.empty)]:
                    place.put(filled)

    # ---- Parts come and go ----

    def _bring(self, part: _Part) -> None:
        if part is self._there:
            return
        self.release()
        self._there = part
        self._fill(self._coming(part))

    def _coming(self, part: _Part) -> list[_Slot]:
        return [slot for slot in part.slots if id(slot.empty) not in self._staying]

    def release(self) -> None:
        """Nothing but what is always there stays in memory."""
        if self._there is None:
            return
        for slot in self._coming(self._there):
            for place in self._places[id(slot.empty)]:
                place.put(place.empty)
        for module in self._there.module.modules():
            if isinstance(module, PackedModule):
                module.to("meta")
        self._there = None

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            raise NotImplementedError(f"a {type(module).__name__} is called with a tensor on the meta device")
        if not is_replaced(module):
            self._bring(self._part_of[module])

    def _take_arguments(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """As a forward pass begins: with the embeddings, at whose device some models look before they call them."""
        self.bring([input_embeddings(model)])
        return on_device((args, kwargs), self._on, {})

    # ---- What calibration asks of a placement ----

    @contextlib.contextmanager
    def placed(self, block: nn.Module) -> Iterator[None]:
        self._bring(self._part_of[block])
        try:
            yield
        finally:
            self.release()

    def present(self, module: nn.Module) -> AbstractContextManager[None]:
        return self.placed(module) if module in self._part_of else contextlib.nullcontext()

    def bring(self, modules: Sequence[nn.Module]) -> None:
        parts = {part for module in modules if (part := self._part_of.get(module)) is not None}
        if len(parts) > 1:
            self.require_whole("equalization would scale what is in a block together with what is outside it")
        for part in parts:
            self._bring(part)

    def change(self, module: nn.Module, name: str, change: Change) -> None:
        self._changes[self._keys[module, name]].append(change)

    def require_whole(self, reason: str) -> None:
        raise ValueError(f"{reason}; {_IN_MEMORY}")

    def outside(self, model: nn.Module) -> torch.device:
        return self._on

    def tensors(self, model: nn.Module) -> Iterator[torch.Tensor]:
        for tensor in (*model.parameters(), *model.buffers()):
            places = self._places.get(id(tensor))
            yield tensor if places is None else self.read([places[0].key])[places[0].key].to(self._on)

    def states(self) -> MutableMapping[Any, torch.Tensor]:
        return OnHost(self._on) if self._folder is None else InFiles(self._on, self._folder)

    def check(self, model: nn.Module, stacks: Sequence[Stack], layers: Iterable[str]) -> None:
        name = type(model).__name__
        if not stacks:
            raise ValueError(f"{name} has no stack of blocks that run one after the other; {_IN_MEMORY}")
        if any(stack.rests is None for stack in stacks):
            raise ValueError(f"blocks of {name} are told by others more than the hidden state; {_IN_MEMORY}")
        layers = list(layers)
        tied = Counter(map(identity, {module_of(model, layer) for layer in layers}))
        for layer in layers:
            if tied[identity(module_of(model, layer))] > 1:
                raise ValueError(f"layer {layer} is tied to one in another block; {_IN_MEMORY}")
            part = self._part_of.get(module_of(model, layer))
            if part is not None and part.is_block and all(stack.index_of(layer) is None for stack in stacks):
                raise ValueError(f"layer {layer} is in a block that no text comes through; {_IN_MEMORY}")


def _parts_of(model: nn.Module) -> list[_Part]:
    """Blocks, and the modules outside blocks that have tensors of their own. Their slots are what is on the meta
    device."""
    blocks = [block for each in block_lists(model).values() for block in each]
    block_of = {module: block for block in blocks for module in block.modules()}
    parts: dict[nn.Module, _Part] = {}
    for name, module in model.named_modules():
        whole = block_of.get(module, module)
        part = parts.setdefault(whole, _Part(whole, is_block=module in block_of))
        part.slots += [
            _Slot(module, own, f"{name}.{own}" if name else own, tensor)
            for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if tensor.is_meta
        ]
    return [part for part in parts.values() if part.slots]
