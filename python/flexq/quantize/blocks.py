"""The stacks of blocks that hidden states go through, and running a model block by block."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        rests: what each block returns beside the hidden state but for tensors, None where that is all; None for a stack
            whose blocks are told by others more than the hidden state: their arguments are known only once those ran.
    """

    name: str
    blocks: nn.ModuleList
    rests: tuple[tuple | None, ...] | None = None

    def index_of(self, layer: str) -> int | None:
        """The block that a layer is in; None if it is outside the stack."""
        if not layer.startswith(f"{self.name}."):
            return None
        index = layer.removeprefix(f"{self.name}.").partition(".")[0]
        return int(index) if index.isdigit() else None


def _is_block(module: nn.Module) -> bool:
    """Holds linear layers, and is none."""
    return not is_linear(module) and any(isinstance(m, Linear) or is_linear(m) for m in module.modules())


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules that all hold linear layers, by name."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_is_block, module))
    }
    return {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}


@dataclass(frozen=True)
class _Event:
    """A block's call in the pass that finds stacks."""

    index: int
    call: "Call"
    output: torch.Tensor
    rest: tuple | None


def stacks_of(model: nn.Module) -> list[Stack]:
    """The model's stacks that token ids go through, in the order in which they run: a decoder has one, an
    encoder-decoder two. Found by a forward pass over a few tokens.

    A stack's blocks run once each, and each takes the hidden state that the one before it returns. Others (ALBERT's one
    block for all layers) cannot be worked on one after the other and are not among them.
    """
    lists = block_lists(model)
    seen: dict[str, list[_Event]] = {}
    with contextlib.ExitStack() as hooks:
        for name, blocks in lists.items():
            for index, block in enumerate(blocks):

                def leave(_, args, kwargs, output, name=name, index=index):
                    event = _Event(index, Call.of(args, kwargs), *_parts(output))
                    seen.setdefault(name, []).append(event)

                hooks.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
        with torch.no_grad():
            model(**arguments(model, probe()))
    return [
        _with_rests(model, Stack(name, lists[name]), events)
        for name, events in seen.items()
        if _is_chain(events, len(lists[name]))
    ]


def probe() -> torch.Tensor:
    return torch.arange(1, 9).unsqueeze(0)


def _is_chain(events: list[_Event], count: int) -> bool:
    if [event.index for event in events] != list(range(count)):
        return False
    if not all(isinstance(event.output, torch.Tensor) for event in events):
        return False  # one that names what it returns (Reformer's two streams)
    pairs = itertools.pairwise(events)
    return all(a.output is b.call.hidden or torch.equal(a.output, b.call.hidden) for a, b in pairs)


def _with_rests(model: nn.Module, stack: Stack, events: list[_Event]) -> Stack:
    """The stack with what its blocks return beside hidden states, tensors left out, if that changes no arguments."""
    rests = tuple(
        event.rest and tuple(None if isinstance(v, torch.Tensor) else v for v in event.rest) for event in events
    )
    known = replace(stack, rests=rests)
    try:
        with torch.no_grad():
            calls = outline(model, known, probe())
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):  # of a model that misses them
        return stack
    real = [event.call for event in events]
    same = all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(calls, real, strict=True))
    return known if same else stack


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors by their values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


def decoder_stack(model: nn.Module) -> Stack:
    """The stack that the logits come from: the last one. ValueError for a model without stacks."""
    stacks = stacks_of(model)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of blocks that run one after the other, each once, which layers are "
            "measured along"
        )
    return stacks[-1]


def on_device(value: Any, device: torch.device, moved: dict[int, torch.Tensor]) -> Any:
    """Tensors, and those in tuples, lists and dictionaries, on a device; what is shared stays shared."""
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(on_device(v, device, moved) for v in value)
    if isinstance(value, dict):
        return {k: on_device(v, device, moved) for k, v in value.items()}
    return value


_HIDDEN = "hidden_states"


def _parts(output: Any) -> tuple[torch.Tensor, tuple | None]:
    """The hidden state that a block returns, and what it returns beside it, None where that is all."""
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return output[0], tuple(output[1:])
    return output, None


def _returned(hidden: torch.Tensor, rest: tuple | None) -> Any:
    """The other way round."""
    return hidden if rest is None else (hidden, *rest)


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
        if self.by_keyword:
            return _parts(block(**{_HIDDEN: self.hidden}, **kwargs))[0]
        return _parts(block(self.hidden, *self.args, **kwargs))[0]

    def to(self, device: torch.device, moved: dict[int, torch.Tensor] | None = None) -> "Call":
        moved = {} if moved is None else moved
        return replace(
            self,
            hidden=self.hidden.to(device),
            args=on_device(self.args, device, moved),
            kwargs=on_device(self.kwargs, device, moved),
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
            traced.last, rest = _parts(output)
            traced.rests.append(rest)
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
        return lambda *args, **kwargs: _returned(hidden, rest)

    handle = None if entered is None else entered.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _running({block: passing(rest) for block, rest in zip(skipped, rests, strict=False)}):
            yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def _running(instead: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Blocks run other functions than their own `forward`, which need none of their weights."""
    for block, function in instead.items():
        block.forward = function
    try:
        yield
    finally:
        for block in instead:
            del block.forward


def is_replaced(block: nn.Module) -> bool:
    """Whether a block runs another function at the moment, and needs no weights."""
    return "forward" in vars(block)


def outline(model: nn.Module, stack: Stack, window: torch.Tensor, device: torch.device | None = None) -> list[Call]:
    """What each block of a stack is called with, found without running one: the first with its hidden state, the
    others with an empty tensor for it.

    Args:
        model: whose stack it is.
        stack: one of which `rests` is known.
        window: token ids [1, L].
        device: where the calls' tensors shall be; None leaves them.
    """
    calls: list[Call] = []
    moved: dict[int, torch.Tensor] = {}

    def noting(rest: tuple | None):
        def note(*args, **kwargs):
            call = Call.of(args, kwargs)
            hidden = call.hidden
            call = replace(call, hidden=hidden if not calls else hidden.new_empty(0))
            calls.append(call if device is None else call.to(device, moved))
            if len(calls) == len(stack.blocks):
                raise Reached
            return _returned(hidden, rest)

        return note

    instead = {b: noting(rest) for b, rest in zip(stack.blocks, stack.rests, strict=True)}
    with _running(instead), contextlib.suppress(Reached):
        model(**arguments(model, window))
    return calls


@contextlib.contextmanager
def bypassed(stacks: Iterable[Stack]) -> Iterator[None]:
    """Forward passes leave hidden states as they are where they come through stacks of which `rests` is known."""

    def passing(rest: tuple | None):
        return lambda *args, **kwargs: _returned(Call.of(args, kwargs).hidden, rest)

    known = [stack for stack in stacks if stack.rests is not None]
    with _running({b: passing(rest) for s in known for b, rest in zip(s.blocks, s.rests, strict=True)}):
        yield
