"""Equalization: inputs of linear layers scaled channel by channel, and their weights the other way, before rounding.

A layer's input channel k is multiplied by c_k and its column k divided by it. What made the input takes the factor: the
norm before it, or the rows of the layer whose output passes linearly into it (up_proj to down_proj, v_proj to o_proj).
That changes nothing in floating point, and evens out what a scale has to cover. c_k = rms(w_k)^(1 - alpha) / rms(x_k)^
alpha, as in SmoothQuant (arXiv 2211.10438) but for mean squares, over all layers that share the input.

What can take a factor is found by trying: a module is run again with factors folded in, on what it was called with, and
has to give what it gave. No class or attribute name is asked for.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.inputs import run
from flexq.quantize.layers import linear_layers
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
        progress: wraps the loop over windows.

    Raises:
        ValueError: an alpha out of range, or no windows.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if not windows:
        raise ValueError("equalization needs at least one window of text")
    done = Equalized(alpha)
    with torch.no_grad():
        folds = _find(model)
        squares = _mean_squares(model, [fold.readers[0] for fold in folds], windows, progress)
        before = result(model)
        for fold in folds:
            factors = _factors(model, fold, squares[fold.readers[0]], alpha)
            undo = _apply(model, fold, factors, carrier)
            if not _close(result(model), before):  # something else reads what was scaled
                undo()
                continue
            (done.norms if model.get_submodule(fold.source).weight.dim() == 1 else done.rows).append(list(fold.readers))
    return done


def _find(model: nn.Module) -> list[_Fold]:
    """Places for factors, those in other layers' rows first: norms then see what became of the rows."""
    linear = linear_layers(model)
    calls = once(watch(model))
    counts: dict[int, int] = {}
    for module in linear.values():
        counts[id(module)] = counts.get(id(module), 0) + 1
    own = {name: calls[name] for name in linear if name in calls and calls[name].x is not None}
    own = {name: call for name, call in own.items() if counts[id(call.module)] == 1 and type(call.module) is nn.Linear}
    readers: dict[int, list[Call]] = {}
    for call in calls.values():
        if call.x is not None and (call.name in own or next(call.module.children(), None) is None):
            readers.setdefault(id(call.x), []).append(call)
    rows, norms = [], []
    for call in calls.values():
        if call.name not in own and next(call.module.children(), None) is None and call.y is not None:
            names = [reader.name for reader in readers.get(id(call.y), [])]
            offset = _norm_offset(call) if names and all(name in own for name in names) else None
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
            if source.y is not None and place is not None and _is_linear_in(parent, source, call, place):
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


def _norm_offset(call: Call) -> float | None:
    """0 for a module that multiplies each channel by its weight, 1 by 1 + its weight; None for others."""
    module, x, y = call.module, call.x, call.y
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or x is None or y.shape[-1:] != weight.shape:
        return None
    factors = _some_factors(len(weight), weight)
    for offset in (0.0, 1.0):
        undo = _scale_norm(module, factors, offset)
        try:
            if _close(_again(call), y * factors):
                return offset
        finally:
            undo()
    return None


def _is_linear_in(parent: Call, source: Call, reader: Call, place: torch.Tensor) -> bool:
    """Whether factors in the source's rows can be taken out again in the reader's columns."""
    factors = _some_factors(source.module.out_features, source.module.weight)
    undo_rows = _scale_rows(source.module, factors)
    undo_columns = _scale_columns(reader.module, 1 / factors[place.to(factors.device)])
    try:
        return _close(_again(parent), parent.y)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return False
    finally:
        undo_columns()
        undo_rows()


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


def _set(module: nn.Module, name: str, value: torch.Tensor) -> Callable[[], None]:
    before = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(before.dtype), requires_grad=before.requires_grad))
    return lambda: setattr(module, name, before)


def _scale_norm(module: nn.Module, factors: torch.Tensor, offset: float) -> Callable[[], None]:
    weight = module.weight.detach().float()
    undo = [_set(module, "weight", (weight + offset) * factors - offset)]
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        undo.append(_set(module, "bias", module.bias.detach().float() * factors))
    return lambda: [each() for each in undo] and None


def _scale_rows(module: nn.Linear, factors: torch.Tensor) -> Callable[[], None]:
    undo = [_set(module, "weight", module.weight.detach().float() * factors.unsqueeze(1))]
    if module.bias is not None:
        undo.append(_set(module, "bias", module.bias.detach().float() * factors))
    return lambda: [each() for each in undo] and None


def _scale_columns(module: nn.Linear, factors: torch.Tensor) -> Callable[[], None]:
    return _set(module, "weight", module.weight.detach().float() * factors)


def _apply(
    model: nn.Module, fold: _Fold, factors: torch.Tensor, carrier: torch.dtype | None = None
) -> Callable[[], None]:
    """Fold the factors of the readers' input channels in; what takes them out again."""
    source = model.get_submodule(fold.source)
    if carrier is not None and source.weight.dim() == 1:
        weight = source.weight.detach().float() + fold.offset
        stored = (weight * factors - fold.offset).to(carrier).float() + fold.offset
        factors = torch.where((weight != 0) & (stored / weight > 0), stored / weight, 1.0)
    undo = [_scale_columns(model.get_submodule(name), 1 / factors) for name in fold.readers]
    of_source = fold.source_factors(factors, source.weight.shape[0])
    undo.append(
        _scale_norm(source, of_source, fold.offset) if source.weight.dim() == 1 else _scale_rows(source, of_source)
    )
    return lambda: [each() for each in undo] and None


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
    model: nn.Module, names: Sequence[str], windows: Sequence[torch.Tensor], progress: Progress | None
) -> dict[str, torch.Tensor]:
    """Of each layer's input channels, float32 [K]."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str):
        def hook(module, args):
            square = args[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + square

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    try:
        for window in progress(list(windows)) if progress else windows:
            run(model, window)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(window.numel() for window in windows)
    return {name: total / tokens for name, total in sums.items()}
