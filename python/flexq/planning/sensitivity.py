"""Which layers need 8-bit activations: the effect of each one's A6 on the model's output, measured or estimated.

The effect is the mean KL divergence of the next-token distribution from the unquantized model's, with the layer at A6
less that with it at A8, everything else at A8. Weights are the same at both, so nothing is quantized anew.

Measuring takes a forward pass a layer. The estimate (fisher.py) takes one forward and backward pass for all of them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from flexq.experts import ExpertWeights
from flexq.linear import Linear
from flexq.planning.files import RankingFile
from flexq.planning.heat_map import heat_map
from flexq.progress import Progress
from flexq.quantize import fisher
from flexq.quantize.blocks import Stack, Trace, decoder_stack, starting_at, trace
from flexq.quantize.experts import kind_of, module_of
from flexq.quantize.inputs import logits
from flexq.quantize.layers import is_linear
from flexq.quantize.outcome import Outcome, outcome

Layer = Linear | ExpertWeights


@dataclass
class LayerSensitivity:
    """One layer's figures.

    Args:
        name: of the layer.
        parameters: of its weight.
        kl: added to the model's KL divergence by A6 here instead of A8, in nats a token.
        spread: standard error of `kl` over the windows; 0 for a single one.
    """

    name: str
    parameters: int
    kl: float
    spread: float

    @property
    def density(self) -> float:
        """KL for each parameter: what 8 bits here are worth."""
        return self.kl / max(self.parameters, 1)


FILE = RankingFile("flexq-sensitivity", 1, LayerSensitivity, "sensitivity to activation bits")


def _over_windows(name: str, layer: Layer, kl: Sequence[float]) -> LayerSensitivity:
    """Mean and standard error of a layer's KL on each window."""
    each = torch.tensor(kl, dtype=torch.float64)
    spread = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else 0.0
    return LayerSensitivity(name, layer.num_weights, each.mean().item(), spread)


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """Linear layers, and projections of experts."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    if not layers:
        raise ValueError("the model has no quantized layer; quantize it first")
    return layers


@contextlib.contextmanager
def act_bits(layers: Sequence[Layer], bits: int) -> Iterator[None]:
    """Layers with activations of `bits` for a while."""
    before = [layer.config for layer in layers]
    for layer in layers:
        layer.config = replace(layer.config, act_bits=bits)
    try:
        yield
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config


class Divergence:
    """KL divergence of a quantized model's outcome (outcome.py) from the unquantized one's, window by window."""

    def __init__(self, reference: nn.Module, windows: Sequence[torch.Tensor]):
        self.windows = list(windows)
        self.expected = [_outcome(reference, window) for window in self.windows]

    def __call__(self, model: nn.Module) -> list[float]:
        return [self.of(_outcome(model, window), i) for i, window in enumerate(self.windows)]

    def mean(self, model: nn.Module) -> float:
        each = self(model)
        return sum(each) / len(each)

    def of(self, found: Outcome, window: int) -> float:
        kl = self.expected[window].divergence(found)
        if not math.isfinite(kl):
            raise ValueError("the model's outputs on this text are not finite (NaN or infinite)")
        return kl


@torch.inference_mode()
def _outcome(model: nn.Module, window: torch.Tensor) -> Outcome:
    return outcome(model, window)


def measure(
    model: nn.Module, reference: nn.Module, windows: Sequence[torch.Tensor], progress: Progress | None = None
) -> list[LayerSensitivity]:
    """The sensitivity of every quantized layer, most KL for a parameter first.

    Args:
        model: quantized; whatever its activations' bits are, they are left as they are.
        reference: the same model unquantized.
        windows: token ids [1, L] each; two of 512 rank layers well enough, more make `spread` smaller.
        progress: wraps the loop over layers, e.g. `tqdm.tqdm`.

    Raises:
        ValueError: no quantized layer, no windows, or outputs that are not finite.
    """
    if not windows:
        raise ValueError("sensitivity needs at least one window of text")
    layers = quantized_layers(model)
    stack = decoder_stack(model)
    divergence = Divergence(reference, windows)
    results = []
    with act_bits(list(layers.values()), 8), torch.inference_mode():
        base = divergence(model)
        traces = [trace(model, stack.blocks, window) for window in windows]
        whole = not _can_begin_inside(model, stack, traces[0], windows[0])
        for name, layer in progress(list(layers.items())) if progress else layers.items():
            index = None if whole else stack.index_of(name)
            added = []
            with act_bits([layer], 6):
                for i, window in enumerate(windows):
                    with _from_block(stack, index, traces[i]):
                        added.append(divergence.of(_outcome(model, window), i) - base[i])
            results.append(_over_windows(name, layer, added))
    return sorted(results, key=lambda layer: -layer.density)


def _from_block(stack: Stack, index: int | None, traced: Trace) -> contextlib.AbstractContextManager:
    """Passes that begin with a block; whole ones for a layer outside the stack."""
    if index is None:
        return contextlib.nullcontext()
    return starting_at(stack.blocks, index, traced.calls[index].hidden, traced.rests)


def _can_begin_inside(model: nn.Module, stack: Stack, traced: Trace, window: torch.Tensor) -> bool:
    """Whether passes that begin with a late block give what whole ones do.

    Blocks of some models (Gemma 3n) look at what earlier ones left.
    """
    expected = outcome(model, window).values
    try:
        with _from_block(stack, len(stack.blocks) - 1, traced):
            return torch.allclose(outcome(model, window).values, expected, rtol=1e-3, atol=1e-3)
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError, ValueError):
        return False


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Sequence[torch.Tensor]) -> float:
    """exp of the mean negative log likelihood of the next token."""
    total = tokens = 0.0
    for window in windows:
        log_p = logits(model, window)[0, :-1].float().log_softmax(-1)
        targets = window[0, 1:].to(log_p.device)
        total -= log_p.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
        tokens += len(targets)
    return math.exp(total / tokens)


def estimate(
    model: nn.Module,
    reference: nn.Module,
    windows: Sequence[torch.Tensor],
    of: str = "a6",
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """What `measure` would find, estimated in one forward and backward pass of `reference` a window.

    Args:
        model: quantized.
        reference: the same model unquantized, its layers by the same names; float32 gives the best gradients.
        windows: token ids [1, L] each.
        of: "a6" for A6 against A8, "quantization" for A8 against the unquantized layer; of both projections of experts
            this is the same, that of the experts as a whole.
        progress: wraps the loop over windows.

    Raises:
        ValueError: no quantized layer or windows, layers that `reference` does not have, or an estimate that is not
            finite.
    """
    if not windows:
        raise ValueError("sensitivity needs at least one window of text")
    if of not in ("a6", "quantization"):
        raise ValueError(f'of must be "a6" or "quantization", got {of!r}')
    layers = quantized_layers(model)
    missing = [name for name in layers if not _is_float_at(reference, name)]
    if missing:
        raise ValueError(f"the reference has no linear layer {missing[0]}")
    callers = {name: module_of(model, name) for name in layers}
    added: dict[str, list[float]] = {name: [] for name in layers}
    with act_bits(list(layers.values()), 8):  # an error of experts is of both projections
        for index, window in enumerate(progress(list(windows)) if progress else windows):
            for name, value in _fisher(layers, callers, reference, window, of, seed=index).items():
                added[name].append(value)
    if not all(math.isfinite(value) for values in added.values() for value in values):
        raise ValueError(
            "the estimate is not finite: the model's outputs on this text are not finite (NaN or infinite), or its "
            "gradients, which float32 may mend"
        )
    results = [_over_windows(name, layer, added[name]) for name, layer in layers.items()]
    return sorted(results, key=lambda layer: -layer.density)


def _is_float_at(model: nn.Module, name: str) -> bool:
    try:
        module = module_of(model, name)
        return is_linear(module) or kind_of(module) is not None
    except AttributeError:
        return False


def _fisher(
    layers: dict[str, Layer],
    callers: dict[str, nn.Module],
    reference: nn.Module,
    window: torch.Tensor,
    of: str,
    seed: int,
) -> dict[str, float]:
    """The estimate of each layer on one window, in nats a token. `callers`: what computes each layer."""
    values = dict.fromkeys(layers, 0.0)

    def watcher(name: str, layer: Layer) -> fisher.Watcher:
        def forward(args: tuple[torch.Tensor, ...], output: torch.Tensor):
            call = callers[name]
            at_8 = call(*args)
            if of == "a6":
                with act_bits([layer], 6):
                    error = call(*args) - at_8
            else:
                error = at_8 - output
            error = error.reshape(-1, error.shape[-1]).float()

            def backward(gradient: torch.Tensor) -> None:
                products = (gradient.reshape(error.shape).float() * error).sum(-1)
                values[name] = 0.5 * products.square().sum(dtype=torch.float64).item()

            return backward

        return forward

    tokens = fisher.backward(reference, window, {n: watcher(n, layer) for n, layer in layers.items()}, seed)
    return {name: value / tokens for name, value in values.items()}


def rank_agreement(a: Sequence[LayerSensitivity], b: Sequence[LayerSensitivity]) -> float:
    """Spearman's rank correlation of two rankings' KL, over the layers that both have; 1 is the same order."""
    of_b = {layer.name: layer.kl for layer in b}
    pairs = [(layer.kl, of_b[layer.name]) for layer in a if layer.name in of_b]
    if len(pairs) < 2:
        raise ValueError("rank agreement needs at least two layers that both rankings have")
    ranks = [torch.tensor(values).argsort().argsort().double() for values in zip(*pairs, strict=True)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def curve(ranking: Sequence[LayerSensitivity]) -> list[tuple[float, float]]:
    """(share of the parameters at A8, KL that is left of all layers' together), from none to all."""
    total = sum(layer.parameters for layer in ranking)
    share, left = 0, sum(layer.kl for layer in ranking)
    points = [(0.0, left)]
    for layer in ranking:
        share += layer.parameters
        left -= layer.kl
        points.append((share / total, left))
    return points


def plot(
    ranking: Sequence[LayerSensitivity],
    path: str | Path,
    block_of: Callable[[str], int] | None = None,
    title: str = "",
) -> None:
    """A heat map of KL, blocks by kinds of layer, and the curve of KL against the share at A8, to an image file.

    Args:
        ranking: of `measure` or `estimate`.
        path: of the image.
        block_of: a layer's block; by default the first number in its name.
        title: what was measured: model, method, text.
    """
    values = {layer.name: layer.kl for layer in ranking}
    with heat_map(values, "square root of the KL added by A6 (nats a token)", path, block_of, title) as axes:
        axes.plot(*zip(*curve(ranking), strict=True))
        axes.set(
            xlabel="share of parameters at A8",
            ylabel="KL left, sum over layers (nats a token)",
            title="what 8 bits buy",
        )
