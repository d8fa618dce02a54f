"""Where a model's weights are while its blocks are worked on one after the other."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from flexq.quantize.blocks import Stack, probe
from flexq.quantize.inputs import arguments


class Placement:
    """Where a model's weights are, and where its blocks are worked on. These are in memory.

    Args:
        device: where blocks are worked on, each moved there and back; None works on them where they are.
    """

    is_whole = True  # all weights are in memory
    together: int | None = 1  # how many windows go through a block before the next one is placed; None for all

    def __init__(self, device: torch.device | str | None = None):
        self.device = None if device is None else torch.device(device)

    @contextlib.contextmanager
    def placed(self, block: nn.Module) -> Iterator[None]:
        """A block where it is worked on, for a while; modules that are replaced in it meanwhile go back without it."""
        before = next(block.parameters()).device if self.device is not None else None
        if before is None or before == self.device:
            yield
            return
        modules = list(block.modules())
        block.to(self.device)
        try:
            yield
        finally:
            block.to(before)
            for module in set(modules) - set(block.modules()):
                module.to(before)

    def present(self, module: nn.Module) -> AbstractContextManager[None]:
        """A module that is in no block, with its weights where it runs, for a while."""
        return contextlib.nullcontext()

    def outside(self, model: nn.Module) -> torch.device:
        """Where what is in no block runs."""
        return arguments(model, probe())["input_ids"].device

    def check(self, model: nn.Module, stacks: Sequence[Stack], layers: Iterable[str]) -> None:
        """ValueError where these layers of a model with these stacks cannot be worked on."""

    def bring(self, modules: Sequence[nn.Module]) -> None:
        """Have these modules, all of the same block or of none, with their weights until others are brought."""

    def change(self, module: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Note that a module's tensor has become what this makes of it."""

    def require_whole(self, reason: str) -> None:
        """ValueError, with the reason, where not all weights are in memory."""

    def tensors(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """The model's parameters and buffers, with their values."""
        yield from model.parameters()
        yield from model.buffers()

    def states(self) -> MutableMapping[Any, torch.Tensor]:
        """Where hidden states are kept."""
        return {}
