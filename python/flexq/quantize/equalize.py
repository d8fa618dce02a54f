"""Equalization: inputs of linear layers scaled channel by channel, and their weights the other way, before rounding.

A layer's input channel k is multiplied by c_k and its column k divided by it. What made the input takes the factor: the
norm before it, or the rows of the layer whose output passes linearly into it (up_proj to down_proj, v_proj to o_proj).
That changes nothing in floating point, and evens out what a scale has to cover. c_k = rms(w_k)^(1 - alpha) / rms(x_k)^
alpha, as in SmoothQuant (arXiv 2211.10438) but for mean squares, over all layers that share the input.

What can take a factor is found by trying: a module is run again with factors folded in, on what it was called with, and
has to give what it gave. No class or attribute name is asked for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.blocks import Stack, stacks_of
from flexq.quantize.group import Group
from flexq.quantize.inputs import result_of
from flexq.quantize.layers import identity, linear_layers
from flexq.quantize.passes import run_windows
from flexq.quantize.placement import Placement
from flexq.quantize.tracing import Call, once, result, watch

# Factors beyond these say more about the text than about the model.
_MOST = 64.0
_TOLERANCE = 1e-3


@dataclass
class Equalized:
    """What `equalize_model` did.

    Args:
        alpha: given.
        norms, rows: groups of layers whose factors went into a norm, and into rows of another layer.
    """

    alpha: float
    norms: list[list[str]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Of layers."""
        return sum(map(len, (*self.norms, *self.rows)))

    def to_dict(self) -> dict[str, Any]:
        """For a plan's `produced_by`."""
        return {"alpha": self.alpha, "norms": len(self.norms), "rows": len(self.rows)}


@dataclass(frozen=True)
class _Fold:
    """A place for the factors of some layers' input.

    Args:
        readers: names of the layers, all that read the input.
        source: name of the module that takes the factors.
        offset: what the source's weight is used with added: 1 in norms that multiply by 1 + weight.
        place: of each of the readers' input channels, among the source's channels.
    """

    readers: tuple[str, ...]
    source: str
    offset: float
    place: torch.Tensor

    def source_factors(self, factors: torch.Tensor, size: int) -> torch.Tensor:
        """Of the source's channels, from those of the input's."""
        out = factors.new_ones(size)
        out[self.place] = factors
        return out


def equalize_model(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    alpha: float = 0.25,
    carrier: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Equalized:
    """Equalize the inputs of a model's linear layers in place: it computes what it did, to rounding.

    Weights are replaced and not written to, so that a `shared_copy` of the model keeps its own. In a model of another
    type than float32 factors are powers of two, which round nothing.

    Args:
        model: a transformers model that reads text, not quantized.
        windows: token ids [1, L] each, on which inputs are measured; a few thousand tokens do.
        alpha: 0 to 1: how far the inputs' differences are taken into the weights.
        carrier: the type that norms will be stored in; factors are then such that it holds theirs without rounding.
        progress: wraps the loop over blocks on which inputs are measured.

    Raises:
        ValueError: an alpha out of range, or no windows.
    """
    return equalize_placed(Placement(), model, windows, alpha, carrier, progress)


def equalize_placed(
    placement: Placement,
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    alpha: float,
    carrier: torch.dtype | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Equalized:
    """`equalize_model` of a model whose weights are as `placement` says, by processes that share the windows.

    Raises:
        ValueError: besides, a factor that would reach from a block into what is not in memory with it.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if not windows:
        raise ValueError("equalization needs at least one window of text")
    with torch.no_grad():
        stacks = stacks_of(model)
        calls = once(watch(model))
        folds = _find(placement, model, calls)
        squares = _mean_squares(
            placement, model, stacks, [fold.readers[0] for fold in folds], windows, progress, group or Group()
        )
        before = result_of(calls[""].output).float()

        def is_same(fold: _Fold) -> bool:
            # To ask a block costs less where the model is not in memory; the model then decides in the end.
            block = None if placement.is_whole else _block_call(stacks, calls, fold)
            if block is not None:
                return _close(_again(block), block.y)
            return _close(result(model), before)

        done = Equalized(alpha)
        for fold in folds:
            placement.bring([model.get_submodule(name) for name in (fold.source, *fold.readers)])
            edits = _edits(model, fold, _factors(model, fold, squares[fold.readers[0]], alpha), carrier)
            undo = [edit.carry_out() for edit in edits]
            if not is_same(fold):  # something else reads what was scaled
                _all(undo)
                continue
            for edit in edits:
                placement.change(edit.module, edit.name, edit.change)
            (done.norms if model.get_submodule(fold.source).weight.dim() == 1 else done.rows).append(list(fold.readers))
        if not placement.is_whole and not _close(result(model), before):
            placement.require_whole("what is scaled in one block is read in others")
    return done


def _all(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _block_call(stacks: Sequence[Stack], calls: dict[str, Call], fold: _Fold) -> Call | None:
    """The call of the block that all of a fold is in."""
    for stack in stacks:
        indices = {stack.index_of(name) for name in (fold.source, *fold.readers)}
        if len(indices) == 1 and (index := indices.pop()) is not None:
            return calls.get(f"{stack.name}.{index}")
    return None


def _find(placement: Placement, model: nn.Module, calls: dict[str, Call]) -> list[_Fold]:
    """Places for factors, those in other layers' rows first: norms then see what became of the rows."""
    linear = linear_layers(model)
    counts = Counter(map(identity, linear.values()))
    own = {name: calls[name] for name in linear if name in calls and calls[name].x is not None}
    own = {
        name: call
        for name, call in own.items()
        if counts[identity(call.module)] == 1 and type(call.module) is nn.Linear
    }
    readers: dict[int, list[Call]] = {}
    for call in calls.values():
        if call.x is not None and (call.name in own or next(call.module.children(), None) is None):
            readers.setdefault(id(call.x), []).append(call)
    rows, norms = [], []
    for call in calls.values():
        if call.name not in own and next(call.module.children(), None) is None and call.y is not None:
            names = [reader.name for reader in readers.get(id(call.y), [])]
            offset = _norm_offset(placement, call) if names and all(name in own for name in names) else None
            if offset is not None:
                norms.append(_Fold(tuple(names), call.name, offset, torch.arange(call.y.shape[-1])))
    heads = _head_size(model)
    for name, call in own.items():
        whole = _smallest_with_others(name, own)
        parent = calls.get(whole)
        if parent is None or parent.y is None or len(readers[id(call.x)]) > 1:
            continue
        beside = [other for n, other in own.items() if n.startswith(f"{whole}.") and n != name]
        for source in reversed(beside):  # up after gate, v after q and k
            place = _place(source.module.out_features, call.module.in_features, heads)
            if source.y is not None and place is not None and _is_linear_in(placement, parent, source, call, place):
                rows.append(_Fold((name,), source.name, 0.0, place))
                break
    return rows + norms


def _smallest_with_others(name: str, layers: Collection[str]) -> str:
    """The innermost module around a layer that has others in it; "" if that is the model."""
    whole = name.rpartition(".")[0]
    while whole and not any(other.startswith(f"{whole}.") and other != name for other in layers):
        whole = whole.rpartition(".")[0]
    return whole


def _head_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    size, heads = getattr(text, "head_dim", None), getattr(text, "num_attention_heads", None)
    if not isinstance(size, int) and isinstance(heads, int) and heads > 0:
        size = getattr(text, "hidden_size", 0) // heads
    return size if isinstance(size, int) and size > 0 else None


def _place(outputs: int, inputs: int, head: int | None) -> torch.Tensor | None:
    """Which output of a layer each input of another comes from: the same, or that of the head that several share."""
    if outputs == inputs:
        return torch.arange(inputs)
    if head is None or inputs % outputs or outputs % head:
        return None
    at = torch.arange(inputs)
    return at // (head * (inputs // outputs)) * head + at % head


def _norm_offset(placement: Placement, call: Call) -> float | None:
    """0 for a module that multiplies each channel by its weight, 1 by 1 + its weight; None for others."""
    module, x, y = call.module, call.x, call.y
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or x is None or y.shape[-1:] != weight.shape:
        return None
    placement.bring([module])
    factors = _some_factors(len(weight), module.weight)
    for offset in (0.0, 1.0):
        undo = [edit.carry_out() for edit in _norm_edits(module, factors, offset)]
        try:
            if _close(_again(call), y * factors):
                return offset
        finally:
            _all(undo)
    return None


def _is_linear_in(placement: Placement, parent: Call, source: Call, reader: Call, place: torch.Tensor) -> bool:
    """Whether factors in the source's rows can be taken out again in the reader's columns."""
    placement.bring([parent.module])
    factors = _some_factors(source.module.out_features, source.module.weight)
    edits = [*_row_edits(source.module, factors), _column_edit(reader.module, 1 / factors[place.to(factors.device)])]
    undo = [edit.carry_out() for edit in edits]
    try:
        return _close(_again(parent), parent.y)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False
    finally:
        _all(undo)


def _some_factors(size: int, like: torch.Tensor) -> torch.Tensor:
    """Powers of two, which round nothing, that no two neighbours share."""
    exponents = torch.randint(-2, 3, (size,), generator=torch.Generator().manual_seed(size))
    return torch.pow(2.0, exponents).to(like)


def _again(call: Call) -> torch.Tensor:
    output = call.module(*call.inputs, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())


# ---- Factors into weights ----


@dataclass(frozen=True)
class _Edit:
    """A module's parameter becomes a function of itself, which is given it in float32."""

    module: nn.Module
    name: str
    function: Callable[[torch.Tensor], torch.Tensor]

    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.function(tensor.detach().float()).to(tensor.dtype)

    def carry_out(self) -> Callable[[], None]:
        """Replace the parameter; returns what takes that back."""
        before = getattr(self.module, self.name)
        setattr(self.module, self.name, nn.Parameter(self.change(before), requires_grad=before.requires_grad))
        return lambda: setattr(self.module, self.name, before)


def _times(factors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor * factors.to(tensor.device)


def _norm_edits(module: nn.Module, factors: torch.Tensor, offset: float) -> list[_Edit]:
    edits = [_Edit(module, "weight", lambda weight: (weight + offset) * factors.to(weight.device) - offset)]
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        edits.append(_Edit(module, "bias", _times(factors)))
    return edits


def _row_edits(module: nn.Linear, factors: torch.Tensor) -> list[_Edit]:
    edits = [_Edit(module, "weight", _times(factors.unsqueeze(1)))]
    return edits if module.bias is None else [*edits, _Edit(module, "bias", _times(factors))]


def _column_edit(module: nn.Linear, factors: torch.Tensor) -> _Edit:
    return _Edit(module, "weight", _times(factors))


def _edits(model: nn.Module, fold: _Fold, factors: torch.Tensor, carrier: torch.dtype | None = None) -> list[_Edit]:
    """What folds the factors of the readers' input channels in."""
    source = model.get_submodule(fold.source)
    if carrier is not None and source.weight.dim() == 1:
        weight = source.weight.detach().float() + fold.offset
        stored = (weight * factors - fold.offset).to(carrier).float() + fold.offset
        factors = torch.where((weight != 0) & (stored / weight > 0), stored / weight, 1.0)
    edits = [_column_edit(model.get_submodule(name), 1 / factors) for name in fold.readers]
    of_source = fold.source_factors(factors, source.weight.shape[0])
    is_norm = source.weight.dim() == 1
    return edits + (_norm_edits(source, of_source, fold.offset) if is_norm else _row_edits(source, of_source))


def _factors(model: nn.Module, fold: _Fold, squares: torch.Tensor, alpha: float) -> torch.Tensor:
    """Of each input channel of the readers, around 1; equal where one channel of the source is several of theirs."""
    modules = [model.get_submodule(name) for name in fold.readers]
    weight = torch.cat([m.weight.detach().float() for m in modules]).square().mean(0)
    channels = int(fold.place.max()) + 1
    x, w = _by_source(squares.to(weight.device), fold, channels), _by_source(weight, fold, channels)
    usable = (x > 0) & (w > 0)
    log = torch.where(usable, (1 - alpha) * w.log() / 2 - alpha * x.log() / 2, 0.0)
    log = torch.where(usable, log - log[usable].mean(), 0.0) if usable.any() else torch.zeros_like(log)
    factors = log.exp().clamp(1 / _MOST, _MOST)
    if modules[0].weight.dtype != torch.float32:
        factors = torch.pow(2.0, factors.log2().round())
    return factors[fold.place.to(factors.device)]


def _by_source(of_inputs: torch.Tensor, fold: _Fold, channels: int) -> torch.Tensor:
    """Means over the input channels that are one channel of the source."""
    place = fold.place.to(of_inputs.device)
    total = of_inputs.new_zeros(channels).index_add(0, place, of_inputs)
    return total / of_inputs.new_zeros(channels).index_add(0, place, torch.ones_like(of_inputs)).clamp(min=1)


def _mean_squares(
    placement: Placement,
    model: nn.Module,
    stacks: Sequence[Stack],
    names: Sequence[str],
    windows: Sequence[torch.Tensor],
    progress: Progress | None,
    group: Group,
) -> dict[str, torch.Tensor]:
    """Of each layer's input channels, float32 [K]."""
    on = placement.outside(model)
    sums = {name: torch.zeros(model.get_submodule(name).in_features, device=on) for name in names}

    def add(name: str):
        def hook(module, args):
            square = args[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name].to(square.device) + square

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    try:
        if own := [window for _, window in group.mine(windows)]:
            run_windows(model, stacks, own, placement, progress)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(window.numel() for window in windows)
    return {name: group.add_up(sums[name]) / tokens for name in names}
