"""Weight bits layer by layer: what each width costs the model's output, and the best widths for a budget.

What a layer of so many bits adds to the KL divergence from the unquantized model is estimated by Fisher information
(quantize/fisher.py), for all layers and widths in one forward and backward pass a window. Choosing widths is then a
knapsack, solved on its convex frontier: from the cheapest widths on, whatever takes away most KL for what it costs.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from flexq.experts import Experts
from flexq.ops import WEIGHT_BITS
from flexq.plan import LayerConfig, Plan
from flexq.planning.costs import WidthCosts
from flexq.planning.files import RankingFile
from flexq.planning.sensitivity import Layer, quantized_layers
from flexq.progress import Progress
from flexq.quantize import fisher
from flexq.quantize.experts import module_of, whole_of
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from flexq.quantize.tracing import shared_inputs

_CALIBRATED = 0  # beside widths
# Of an error, by calibration: what more it takes away at 6 bits is not relied on at others.
_LEAST_LEFT = 0.25


@dataclass
class WidthSensitivity:
    """One layer's figures, of experts those of both projections together.

    Args:
        name: of the layer, or of the experts.
        parameters: of its weight.
        bytes: of it as stored, scales included, by weight bits.
        kl: added to the model's KL divergence by the layer at these weight bits, in nats a token; that of its
            activations is in each.
        spread: standard errors of `kl` over the windows; 0 for a single one.
    """

    name: str
    parameters: int
    bytes: dict[int, int]
    kl: dict[int, float]
    spread: dict[int, float]


FILE = RankingFile("flexq-width-sensitivity", 1, WidthSensitivity, "sensitivity to weight bits")


def rounded_models(
    reference: nn.Module,
    plan: Plan,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    among: Sequence[int] = WEIGHT_BITS,
) -> dict[int, nn.Module]:
    """The model at each of several widths, rounded to nearest; what is not quantized they share with `reference`."""

    def at(bits: int) -> Plan:
        layers = {name: None if c is None else replace(c, weight_bits=bits) for name, c in plan.layers.items()}
        return Plan(replace(plan.defaults, weight_bits=bits), layers)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are left alone, once for each width
        return {bits: quantize_model(shared_copy(reference), at(bits), include, skip) for bits in among}


def estimate(
    reference: nn.Module,
    models: Mapping[int, nn.Module],
    windows: Sequence[torch.Tensor],
    progress: Progress | None = None,
    device: torch.device | None = None,
    calibrated: nn.Module | None = None,
) -> list[WidthSensitivity]:
    """The sensitivity of every layer to its weight bits, in the model's order.

    Rounding with a text in view takes most of some layers' error away and little of others'. Where the model so rounded
    is given at one width, the errors of each layer's weights are scaled to what they are there, at every width alike.

    Args:
        reference: unquantized; float32 gives the best gradients.
        models: the same model with all weights at each of several widths, as of `rounded_models`.
        windows: token ids [1, L] each.
        progress: wraps the loop over windows.
        device: as for `fisher.backward`.
        calibrated: the model with all weights at 6 bits, rounded as they are going to be.

    Raises:
        ValueError: no windows, or models whose layers differ in more than their weight bits.
    """
    if not windows:
        raise ValueError("sensitivity needs at least one window of text")
    widths = list(models)
    models = dict(models) if calibrated is None else {**models, _CALIBRATED: calibrated}
    parts = {bits: _by_place(model) for bits, model in models.items()}
    first = next(iter(parts.values()))
    if any(of_width.keys() != first.keys() for of_width in parts.values()):
        raise ValueError("the models of different widths have different layers")
    callers = {name: {bits: module_of(model, name) for bits, model in models.items()} for name in first}
    added: dict[str, dict[int, list[float]]] = {name: {bits: [] for bits in models} for name in first}
    for index, window in enumerate(progress(list(windows)) if progress else windows):
        for name, by_width in _fisher(callers, reference, window, index, device).items():
            for bits, kl in by_width.items():
                added[name][bits].append(kl)
    results = []
    for name, layers in first.items():
        kl = {bits: torch.tensor(each, dtype=torch.float64) for bits, each in added[name].items()}
        if calibrated is not None:
            kl = _as_calibrated(kl)
        results.append(
            WidthSensitivity(
                name,
                sum(layer.num_weights for layer in layers),
                {bits: sum(layer.stored_bytes for layer in parts[bits][name]) for bits in widths},
                {bits: each.mean().item() for bits, each in kl.items()},
                {b: (each.std() / len(each) ** 0.5).item() if len(each) > 1 else 0.0 for b, each in kl.items()},
            )
        )
    return results


def _as_calibrated(kl: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Of each width and window, from those of weights rounded to nearest and of calibrated ones at 6 bits."""
    rounded = {bits: each for bits, each in kl.items() if bits != _CALIBRATED}
    # An error's square goes with the step's: what 8 bits have in common with 6 is the activations' part.
    ratio = (_max_code(6) / _max_code(8)) ** 2
    mean = {bits: each.mean().item() for bits, each in kl.items()}
    of_activations = max(0.0, (mean[8] - ratio * mean[6]) / (1 - ratio))
    left = (mean[_CALIBRATED] - of_activations) / max(mean[6] - of_activations, torch.finfo(torch.float32).tiny)
    left = min(max(left, _LEAST_LEFT), 1.0)
    share = of_activations / max(mean[8], torch.finfo(torch.float32).tiny)
    return {bits: left * each + (1 - left) * share * rounded[8] for bits, each in rounded.items()}


def _max_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _by_place(model: nn.Module) -> dict[str, list[Layer]]:
    """Quantized layers by name; the projections of experts by theirs."""
    places: dict[str, list[Layer]] = {}
    for name, layer in quantized_layers(model).items():
        whole = whole_of(name) if isinstance(module_of(model, name), Experts) else name
        places.setdefault(whole, []).append(layer)
    return places


def _fisher(
    callers: Mapping[str, Mapping[int, nn.Module]],
    reference: nn.Module,
    window: torch.Tensor,
    seed: int,
    device: torch.device | None,
) -> dict[str, dict[int, float]]:
    """The estimate of each place at each width on one window, in nats a token; 0 where nothing was called."""
    values = {name: dict.fromkeys(by_width, 0.0) for name, by_width in callers.items()}

    def watcher(name: str) -> fisher.Watcher:
        def forward(args: tuple[torch.Tensor, ...], output: torch.Tensor):
            errors = {}
            for bits, call in callers[name].items():
                with _at(call, output.device):
                    errors[bits] = (call(*args) - output).flatten(0, -2).float()

            def backward(gradient: torch.Tensor) -> None:
                flat = gradient.flatten(0, -2).float()
                for bits, error in errors.items():
                    values[name][bits] = 0.5 * (flat * error).sum(-1).square().sum(dtype=torch.float64).item()

            return backward

        return forward

    tokens = fisher.backward(reference, window, {name: watcher(name) for name in callers}, seed, device)
    return {name: {bits: kl / tokens for bits, kl in by_width.items()} for name, by_width in values.items()}


@contextlib.contextmanager
def _at(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """A quantized layer on a device for a while, where a block was moved without it."""
    home = layer.device
    if home == device:
        yield
        return
    layer.to(device)
    try:
        yield
    finally:
        layer.to(home)


# ---- Choosing --------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, ranking: Sequence[WidthSensitivity]) -> list[list[str]]:
    """Layers that are to have one width each: those that share an input, which vLLM merges, and others alone."""
    return shared_inputs(model, [layer.name for layer in ranking])


@dataclass
class Widths:
    """What `solve` found.

    Args:
        bits: of each layer.
        price: of all of them.
        kl: that they add by the estimate, in nats a token.
    """

    bits: dict[str, int]
    price: float
    kl: float


Price = Callable[[WidthSensitivity], Mapping[int, float]]


def in_bits(layer: WidthSensitivity) -> dict[int, float]:
    """The price of a layer by which a budget is a sum of weight bits, scales left out."""
    return {bits: float(bits * layer.parameters) for bits in layer.kl}


def in_bytes(layer: WidthSensitivity) -> dict[int, float]:
    return {bits: float(size) for bits, size in layer.bytes.items()}


def in_time(costs: WidthCosts) -> Price:
    """The price of a layer by which a budget is the microseconds that all take on a device."""
    return lambda layer: costs.microseconds[layer.name]


def price_of(ranking: Sequence[WidthSensitivity], bits: Mapping[str, int], price: Price = in_bits) -> float:
    """What the layers cost at these widths."""
    return sum(price(layer)[bits[layer.name]] for layer in ranking)


def everywhere(ranking: Sequence[WidthSensitivity], bits: int, price: Price = in_bits) -> Widths:
    """One width for all layers."""
    chosen = {layer.name: bits for layer in ranking}
    return Widths(chosen, price_of(ranking, chosen, price), sum(layer.kl[bits] for layer in ranking))


def uniform_price(ranking: Sequence[WidthSensitivity], bits: float, price: Price = in_bits) -> float:
    """What all layers cost with so many bits in each; between two widths on the straight line.

    ValueError for bits that are not from the narrowest width to the widest.
    """
    widths = sorted(ranking[0].kl)
    if not widths[0] <= bits <= widths[-1]:
        raise ValueError(f"weight bits must be from {widths[0]} to {widths[-1]} in the mean, got {bits:g}")
    below = max(width for width in widths if width <= bits)
    above = min(width for width in widths if width >= bits)
    part = (bits - below) / (above - below) if above > below else 0.0
    at_below, at_above = (everywhere(ranking, width, price).price for width in (below, above))
    return (1 - part) * at_below + part * at_above


def frontier(
    ranking: Sequence[WidthSensitivity],
    groups: Sequence[Sequence[str]],
    price: Price = in_bits,
) -> Iterator[Widths]:
    """From the cheapest widths to the most faithful ones, a step at a time, each the one with most KL for its price.

    Args:
        ranking: of `estimate`.
        groups: of `groups_of`: layers that get one width.
        price: of a layer at each width. A width that another one is better than at a lower price is left out.
    """
    layers = {layer.name: layer for layer in ranking}
    steps, now, total, kl = [], {}, 0.0, 0.0
    for group in groups:
        options = _convex(
            sorted(
                (
                    sum(price(layers[name])[bits] for name in group),
                    sum(layers[name].kl[bits] for name in group),
                    bits,
                )
                for bits in layers[group[0]].kl
            )
        )
        cost, added, bits = options[0]
        now |= dict.fromkeys(group, bits)
        total, kl = total + cost, kl + added
        for (c0, k0, _), (c1, k1, after) in itertools.pairwise(options):
            steps.append(((k0 - k1) / (c1 - c0), c1 - c0, k1 - k0, group, after))
    yield Widths(dict(now), total, kl)
    for _, more, less, group, bits in sorted(steps, key=lambda step: -step[0]):  # a group's own fall in order: convex
        now |= dict.fromkeys(group, bits)
        total, kl = total + more, kl + less
        yield Widths(dict(now), total, kl)


def _convex(options: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Of (price, KL, bits) by rising price, those on the lower convex hull that fall in KL."""
    hull: list[tuple[float, float, int]] = []
    for option in options:
        if hull and option[1] >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (c0, k0, _), (c1, k1, _) = hull[-2:]
            if (k0 - k1) * (option[0] - c1) > (k1 - option[1]) * (c1 - c0):
                break
            hull.pop()
        hull.append(option)
    return hull


def covers(budget: float, price: float) -> bool:
    """Whether a budget is enough for a price, sums of floats as they are."""
    return price <= budget * (1 + 1e-9)


def solve(
    ranking: Sequence[WidthSensitivity],
    groups: Sequence[Sequence[str]],
    budget: float,
    price: Price = in_bits,
) -> Widths:
    """The widths of least estimated KL whose price is within a budget; the arguments as for `frontier`.

    ValueError for a budget that the cheapest widths exceed.
    """
    best: Widths | None = None
    for point in frontier(ranking, groups, price):
        if not covers(budget, point.price):
            break
        best = point
    if best is None:
        least = next(iter(frontier(ranking, groups, price))).price
        raise ValueError(f"the budget must be {least:.6g} or more, what the cheapest widths take; got {budget:.6g}")
    return best


def mean_bits(ranking: Sequence[WidthSensitivity], bits: Mapping[str, int]) -> float:
    """A weight's, over the layers of `bits`."""
    sizes = {layer.name: layer.parameters for layer in ranking if layer.name in bits}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def plan_of(plan: Plan, resolved: Mapping[str, LayerConfig], bits: Mapping[str, int]) -> Plan:
    """A plan that names every layer, with these widths.

    Args:
        plan: whose defaults and record are kept.
        resolved: the `layers` of `quantize.model.resolve_plan`: settings of each layer and projection of experts.
        bits: of `solve`, by the names of layers and of experts.
    """
    layers: dict[str, LayerConfig | None] = {name: c for name, c in plan.layers.items() if c is None}
    for name, config in resolved.items():
        width = bits.get(name, bits.get(whole_of(name)))
        layers[name] = config if width is None else replace(config, weight_bits=width)
    return replace(plan, layers=layers, produced_by=dict(plan.produced_by))
