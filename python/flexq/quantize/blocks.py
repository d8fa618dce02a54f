"""The stacks of blocks that hidden states go through, and running a model block by block."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear
from flexq.quantize.inputs import arguments
from flexq.quantize.layers import is_linear


class Reached(Exception):
    """What was wanted has been reached; the rest of the model need not run."""


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other: a decoder's, or an encoder's.

    Args:
        name: of the list of blocks in the model.
        blocks: that list.
    """

    name: str
    blocks: nn.ModuleList

    def index_of(self, layer: str) -> int | None:
        """The block that a layer is in; None if it is outside the stack."""
        if not layer.startswith(f"{self.name}."):
            return None
        index = layer.removeprefix(f"{self.name}.").partition(".")[0]
        return int(index) if index.isdigit() else None


def _is_block(module: nn.Module) -> bool:
    """Holds linear layers, and is none."""
    return not is_linear(module) and any(isinstance(m, Linear) or is_linear(m) for m in module.modules())


def stacks_of(model: nn.Module) -> list[Stack]:
    """The model's stacks that token ids go through, in the order in which they run: a decoder has one, an
    encoder-decoder two. Found by a forward pass over a few tokens.

    A stack's blocks run once each, and each takes the hidden state that the one before it returns. Others (ALBERT's one
    block for all layers) cannot be worked on one after the other and are not among them.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_is_block, module))
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    seen: dict[str, list[tuple[int, torch.Tensor]]] = {}  # blocks and hidden states as they come, in and out in turn
    with contextlib.ExitStack() as hooks:
        for name, blocks in outermost.items():
            for index, block in enumerate(blocks):

                def enter(_, args, kwargs, name=name, index=index):
                    seen.setdefault(name, []).append((index, Call.of(args, kwargs).hidden))

                def leave(_, args, output, name=name, index=index):
                    seen[name].append((index, output[0] if isinstance(output, tuple) else output))

                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
        with torch.no_grad():
            model(**arguments(model, torch.arange(1, 5).unsqueeze(0)))
    return [Stack(name, outermost[name]) for name, events in seen.items() if _is_chain(events, len(outermost[name]))]


def _is_chain(events: list[tuple[int, torch.Tensor]], count: int) -> bool:
    if [index for index, _ in events] != [i for i in range(count) for _ in range(2)]:
        return False
    outputs, inputs = events[1:-1:2], events[2::2]
    return all(out is into or torch.equal(out, into) for (_, out), (_, into) in zip(outputs, inputs, strict=True))


def decoder_stack(model: nn.Module) -> Stack:
    """The stack that the logits come from: the last one. ValueError for a model without stacks."""
    stacks = stacks_of(model)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of blocks that run one after the other, each once, which layers are "
            "measured along"
        )
    return stacks[-1]


def _moved(value: Any, device: torch.device, moved: dict[int, torch.Tensor]) -> Any:
    """Tensors, and those in tuples, lists and dictionaries, on a device; what is shared stays shared."""
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_moved(v, device, moved) for v in value)
    if isinstance(value, dict):
        return {k: _moved(v, device, moved) for k, v in value.items()}
    return value


_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """What a block is called with: a hidden state [1, L, H], and other arguments and keywords, each block its own."""

    hidden: torch.Tensor
    args: tuple = ()
    kwargs: dict[str, Any] | None = None
    by_keyword: bool = False  # the hidden state is

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> "Call":
        if args:
            return cls(args[0], args[1:], kwargs)
        others = {k: v for k, v in kwargs.items() if k != _HIDDEN}
        return cls(kwargs[_HIDDEN], (), others, by_keyword=True)

    def run(self, block: nn.Module) -> torch.Tensor:
        """The hidden state that comes out."""
        kwargs = self.kwargs or {}
        output = (
            block(**{_HIDDEN: self.hidden}, **kwargs) if self.by_keyword else block(self.hidden, *self.args, **kwargs)
        )
        return output[0] if isinstance(output, tuple) else output

    def to(self, device: torch.device, moved: dict[int, torch.Tensor] | None = None) -> "Call":
        moved = {} if moved is None else moved
        return replace(
            self,
            hidden=self.hidden.to(device),
            args=_moved(self.args, device, moved),
            kwargs=_moved(self.kwargs, device, moved),
        )


@dataclass
class Trace:
    """A window's way through a stack.

    Args:
        calls: what each block is called with.
        rests: what each block returns beside the hidden state; None where that is all.
        last: the hidden state that leaves the last block.
    """

    calls: list[Call]
    rests: list[tuple | None]
    last: torch.Tensor | None = None


def trace(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    window: torch.Tensor,
    device: torch.device | None = None,
    first_only: bool = False,
) -> Trace:
    """Run the model on a window up to the end of a stack.

    Args:
        model: whose stack it is.
        blocks: all of the stack.
        window: token ids [1, L].
        device: where blocks run, each one moved there and back; None runs them where they are.
        first_only: keep the first block's hidden state alone, an empty tensor for the others.
    """
    traced = Trace([], [])
    moved: dict[int, torch.Tensor] = {}

    def enter(block, args, kwargs):
        call = Call.of(args, kwargs)
        if device is not None:
            call = call.to(device, moved)
            block.to(device)
        kept = not first_only or not traced.calls
        traced.calls.append(call if kept else replace(call, hidden=call.hidden.new_empty(0)))
        if call.by_keyword:
            return (), {**(call.kwargs or {}), _HIDDEN: call.hidden}
        return (call.hidden, *call.args), call.kwargs

    def leave(home: torch.device):
        def hook(block, args, output):
            traced.last = output[0] if isinstance(output, tuple) else output
            traced.rests.append(output[1:] if isinstance(output, tuple) else None)
            if device is not None:
                block.to(home)
            if len(traced.rests) == len(blocks):
                raise Reached

        return hook

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            home = next(block.parameters()).device
            stack.callback(block.register_forward_hook(leave(home)).remove)
        with contextlib.suppress(Reached):
            model(**arguments(model, window))
    return traced


@contextlib.contextmanager
def starting_at(
    blocks: nn.ModuleList, index: int, hidden: torch.Tensor, rests: Sequence[tuple | None]
) -> Iterator[None]:
    """A forward pass of the model begins with block `index`, whose hidden state is given; with what follows the last
    block if there is none of that index.

    Args:
        blocks: of a stack.
        index: of the block to begin with, up to their number.
        hidden: its hidden state.
        rests: of a `Trace`: what the blocks before return beside hidden states.
    """
    skipped = list(blocks)[:index]
    entered = blocks[index] if index < len(blocks) else None

    def enter(_, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, _HIDDEN: hidden})

    def passing(rest: tuple | None):
        return lambda *args, **kwargs: hidden if rest is None else (hidden, *rest)

    handle = None if entered is None else entered.register_forward_pre_hook(enter, with_kwargs=True)
    for block, rest in zip(skipped, rests, strict=False):
        block.forward = passing(rest)
    try:
        yield
    finally:
        if handle is not None:
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
