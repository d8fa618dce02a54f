"""The stack of decoder blocks that a hidden state goes through, and running a model block by block."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear


class Reached(Exception):
    """What was wanted has been reached; the rest of the model need not run."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of blocks, by structure: the longest list of modules with linears.

    Raises:
        ValueError: there is none.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any(isinstance(m, (nn.Linear, Linear)) for m in block.modules()) for block in module)
    ]
    if not stacks:
        raise ValueError(
            "the model has no stack of blocks with linear layers, so it cannot be calibrated block by block"
        )
    return max(stacks, key=lambda stack: (len(stack[1]), -stack[0].count(".")))


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those in tuples, lists and dictionaries, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Call:
    """What a block is called with: a hidden state [1, L, H], and other arguments and keywords, which change nothing."""

    hidden: torch.Tensor
    args: tuple = ()
    kwargs: dict[str, Any] | None = None

    def run(self, block: nn.Module) -> torch.Tensor:
        """The hidden state that comes out."""
        output = block(self.hidden, *self.args, **(self.kwargs or {}))
        return output[0] if isinstance(output, tuple) else output

    def after(self, block: nn.Module) -> "Call":
        """What the next block is called with. For models whose blocks all get the same arguments."""
        return replace(self, hidden=self.run(block))

    def to(self, device: torch.device) -> "Call":
        return Call(self.hidden.to(device), _moved(self.args, device), _moved(self.kwargs, device))


def first_calls(model: nn.Module, blocks: Sequence[nn.Module], windows: Sequence[torch.Tensor]) -> list[Call]:
    """What the first block is called with for each window of token ids [1, L]."""
    return [calls_of(model, blocks[:1], window)[0] for window in windows]


def calls_of(model: nn.Module, blocks: Sequence[nn.Module], window: torch.Tensor) -> list[Call]:
    """What each of the blocks is called with for a window; the model stops at the last of them."""
    calls: list[Call] = []

    def keep(_, args, kwargs):
        calls.append(Call(args[0], args[1:], kwargs))
        if len(calls) == len(blocks):
            raise Reached

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        with contextlib.suppress(Reached):
            model(window.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def starting_at(blocks: nn.ModuleList, index: int, hidden: torch.Tensor) -> Iterator[None]:
    """A forward pass of the model begins with block `index`, whose hidden state is given; with what follows the last
    block if there is none of that index."""
    skipped = list(blocks)[:index]
    entered = blocks[min(index, len(blocks) - 1)]

    def enter(_, args, kwargs):
        return (hidden, *args[1:]), kwargs

    handle = entered.register_forward_pre_hook(enter, with_kwargs=True)
    for block in skipped:
        block.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield
    finally:
        handle.remove()
        for block in skipped:
            del block.forward


@contextlib.contextmanager
def placed(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """A block on a device for a while, then where it was; None leaves it."""
    home = next(block.parameters()).device if device is not None else None
    if home is None or home == device:
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)
