"""Plans from a budget or a target: where 6-bit activations go, and what is given up for accuracy.

Layers get A8 in the order of what it is worth there, until a budget is spent or the real, packed model meets a target:
every try is a pass of the whole model, so that what layers do to each other counts. Where A8 everywhere misses the
target, layers change from scheme `channel` to `group`, and then stay unquantized.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flexq.embedding import Embedding
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.plan import Plan
from flexq.planning import sensitivity
from flexq.planning.costs import LayerCost
from flexq.planning.sensitivity import Layer, LayerSensitivity, act_bits, quantized_layers
from flexq.progress import Progress
from flexq.quantize.experts import module_of, whole_of
from flexq.quantize.layers import record_plan, replace_module


def plan_of(model: nn.Module, at_8: Sequence[str], how: Mapping[str, Any]) -> Plan:
    """The model's plan with 8-bit activations in `at_8` and 6-bit ones elsewhere."""
    recorded = record_plan(model, getattr(model, "flexq_plan", Plan()))
    wanted = set(at_8)
    layers = dict(recorded.layers)
    for name, config in recorded.layers.items():
        if config is not None and not isinstance(module_of(model, name), Embedding):
            layers[name] = replace(config, act_bits=8 if name in wanted else 6)
    defaults = replace(recorded.defaults, act_bits=6)
    return replace(recorded, defaults=defaults, layers=layers, produced_by={**recorded.produced_by, **how})


def within_budget(
    ranking: Sequence[LayerSensitivity], budget: float, costs: Mapping[str, LayerCost] | None = None
) -> list[str]:
    """The layers to keep at A8 when they may hold a share `budget` (0 to 1) of the parameters.

    Args:
        ranking: of `sensitivity.measure` or `estimate`.
        budget: the share.
        costs: of `costs.measure_costs`; then it is a share of the linear layers' time with A8 everywhere instead.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget must be a share from 0 to 1, got {budget}")
    price = {layer.name: costs[layer.name].at_8 if costs is not None else layer.parameters for layer in ranking}
    left = budget * sum(price.values())
    chosen = []
    for layer in sorted(ranking, key=lambda layer: -layer.kl / max(price[layer.name], 1e-30)):
        if layer.kl > 0 and price[layer.name] <= left:
            chosen.append(layer.name)
            left -= price[layer.name]
    return chosen


def for_target(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    ranking: Sequence[LayerSensitivity],
    target: float,
) -> tuple[list[str], float]:
    """The shortest prefix of the ranking whose layers at A8 bring the measured score to `target`, and the score it has.

    Args:
        model: quantized.
        score: what is to be at most `target`: `Divergence.mean`, or the perplexity.
        ranking: of `measure` or `estimate`; layers that it does not have are at A8.
        target: nats, or a perplexity.

    Raises:
        ValueError: not even all of them do; says how near they come. `replace_for_target` goes on from there.
    """
    layers = quantized_layers(model)

    def with_at_8(count: int) -> float:
        at_6 = [layers[layer.name] for layer in ranking[count:]]
        with act_bits(list(layers.values()), 8), act_bits(at_6, 6):
            return score(model)

    best = with_at_8(len(ranking))
    if best > target:
        raise ValueError(f"a target of {target:g} cannot be met: with A8 in every layer the model has {best:.4g}")
    count, reached = _fewest(with_at_8, target, len(ranking), best)
    return [layer.name for layer in ranking[:count]], reached


def replace_for_target(
    model: nn.Module,
    better: Mapping[str, nn.Module],
    score: Callable[[nn.Module], float],
    ranking: Sequence[LayerSensitivity],
    target: float,
) -> tuple[list[str], float]:
    """Where A8 everywhere is not enough: the shortest prefix of the ranking that brings the score to `target` once its
    layers' places are taken by better ones, everything else at A8. They are taken for good.

    Args:
        model: quantized.
        better: for each name in the ranking what is to take its place: the layer in scheme `group`, or unquantized.
        ranking: most of what is gained for a parameter first, experts as a whole (`with_whole_experts`).
        The others as for `for_target`.

    Raises:
        ValueError: not even all of them do; says how near they come, and leaves the model as it was.
    """
    places = {_place_of(model, name) for name in quantized_layers(model)}
    now = {layer.name: model.get_submodule(layer.name) for layer in ranking}

    def put(count: int) -> None:
        for index, layer in enumerate(ranking):
            replace_module(model, layer.name, better[layer.name] if index < count else now[layer.name])

    def with_better(count: int) -> float:
        put(count)
        try:
            with act_bits([m for m in model.modules() if isinstance(m, Layer)], 8):
                return score(model)
        finally:
            put(0)

    most = len(ranking)
    if set(better) >= places and not any(isinstance(module, (Linear, Experts)) for module in better.values()):
        most -= 1  # something has to be quantized
    best = with_better(most)
    if best > target:
        raise ValueError(f"a target of {target:g} cannot be met: at best the model has {best:.4g}")
    count, reached = _fewest(with_better, target, most, best)
    put(count)
    return [layer.name for layer in ranking[:count]], reached


def _place_of(model: nn.Module, layer: str) -> str:
    """The name of the module that a layer is replaced with: its own or, of a projection, that of the experts."""
    return whole_of(layer) if isinstance(module_of(model, layer), Experts) else layer


def with_whole_experts(model: nn.Module, ranking: Sequence[LayerSensitivity]) -> list[LayerSensitivity]:
    """A ranking by `estimate(..., of="quantization")` in which experts, whose projections are each estimated as the
    whole, are one layer; most KL for a parameter first."""
    wholes: dict[str, LayerSensitivity] = {}
    for layer in ranking:
        place = _place_of(model, layer.name)
        known = wholes.get(place)
        size = layer.parameters + (known.parameters if known is not None else 0)
        wholes[place] = replace(layer, name=place, parameters=size)
    return sorted(wholes.values(), key=lambda layer: -layer.density)


def _fewest(score: Callable[[int], float], target: float, most: int, at_most: float) -> tuple[int, float]:
    """The smallest count whose score is at most `target`, by bisection, and that score."""
    low, high = -1, most  # the target is missed at low, met at high
    scores = {high: at_most}
    while high - low > 1:
        middle = (low + high) // 2
        scores[middle] = score(middle)
        if scores[middle] <= target:
            high = middle
        else:
            low = middle
    return high, scores[high]


@dataclass
class Choice:
    """What `choose` found.

    Args:
        plan: of the model, which has been changed accordingly.
        at_8: layers with 8-bit activations.
        regrouped: that went from scheme `channel` to `group`.
        unquantized: that were left so.
        reached: the score, where there was a target.
        notes: sentences for whoever asked.
    """

    plan: Plan
    at_8: list[str]
    regrouped: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    reached: float | None = None
    notes: list[str] = field(default_factory=list)


def choose(
    model: nn.Module,
    reference: nn.Module,
    probes: Sequence[torch.Tensor],
    budget: float | None = None,
    target_kl: float | None = None,
    target_ppl: float | None = None,
    costs: Mapping[str, LayerCost] | None = None,
    budget_of: str = "parameters",
    a6_anywhere: bool = False,
    estimate: bool = False,
    in_group: Callable[[], nn.Module] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Give a quantized model the activations' bits, and if need be schemes, that a budget or a target asks for.

    Args:
        model: quantized; changed in place.
        reference: the same model unquantized.
        probes: token ids [1, L] each, on which layers and the model are measured.
        budget, target_kl, target_ppl: one of them: the share that may be at A8, the mean KL divergence from the
            reference, or the perplexity.
        costs: of `costs.measure_costs`: A6 goes only where it saves time by them. Without, anywhere.
        budget_of: what the budget is a share of, "parameters" or "time" (which takes costs).
        a6_anywhere: whatever the costs say.
        estimate: rank layers by `sensitivity.estimate`, not by measuring each.
        in_group: makes the model in scheme `group`, for when a target demands it; None leaves schemes alone.
        progress: wraps the loops over layers or windows.

    Raises:
        ValueError: not exactly one of budget and targets, or a target that cannot be met (says how near one can come).
    """
    if sum(value is not None for value in (budget, target_kl, target_ppl)) != 1:
        raise ValueError("choose takes one of budget, target_kl and target_ppl")
    if budget_of not in ("parameters", "time"):
        raise ValueError(f'budget_of must be "parameters" or "time", got {budget_of!r}')
    if budget_of == "time" and costs is None:
        raise ValueError("a budget of time takes the layers' costs")
    layers = quantized_layers(model)
    slower = [] if costs is None or a6_anywhere else [name for name in layers if not costs[name].a6_saves]
    how: dict[str, Any] = {}
    notes = []
    if slower:
        many = "any layer" if len(slower) == len(layers) else f"{len(slower)} of {len(layers)} layers"
        notes.append(f"A6 saves no time on {costs[slower[0]].device} in {many}: A8 there, which is more accurate")
        how["a8_for_lack_of_gain"] = len(slower)
    ranking: list[LayerSensitivity] = []
    if len(slower) < len(layers):
        rank = sensitivity.estimate if estimate else sensitivity.measure
        ranking = [layer for layer in rank(model, reference, probes, progress=progress) if layer.name not in slower]
        how["ranked_by"] = f"KL per parameter, {'estimated' if estimate else 'measured'}"
    choice = Choice(Plan(), [], notes=notes)
    if budget is not None:
        choice.at_8 = within_budget(ranking, budget, costs if budget_of == "time" else None) + slower
        how |= {"budget": budget, "budget_of": budget_of}
    else:
        if target_kl is not None:
            score, target, what = sensitivity.Divergence(reference, probes).mean, target_kl, "kl"
        else:
            score, target, what = (lambda m: sensitivity.perplexity(m, probes)), target_ppl, "ppl"
        try:
            at_8, choice.reached = for_target(model, score, ranking, target)
            choice.at_8 = at_8 + slower
        except ValueError:
            _demanding(choice, model, reference, probes, score, target, in_group)
        how |= {f"target_{what}": target, f"measured_{what}": choice.reached}
    choice.plan = apply(model, plan_of(model, choice.at_8, how))
    return choice


def _demanding(choice: Choice, model: nn.Module, reference: nn.Module, probes, score, target: float, in_group) -> None:
    """A8 everywhere has missed the target: better layers take places."""
    layers = quantized_layers(model)
    places = {name: _place_of(model, name) for name in layers}
    channel = list(dict.fromkeys(places[n] for n, layer in layers.items() if layer.config.scheme == "channel"))
    if in_group is not None and channel:
        grouped = in_group()
        better = {name: grouped.get_submodule(name) for name in channel}
        fine = _error_of_quantization(grouped, reference, probes)
        kl = {layer.name: layer.kl for layer in fine}
        coarse = _error_of_quantization(model, reference, probes)
        gains = [replace(layer, kl=layer.kl - kl[layer.name]) for layer in coarse if layer.name in better]
        gains.sort(key=lambda layer: -layer.density)
        try:
            choice.regrouped, choice.reached = replace_for_target(model, better, score, gains, target)
        except ValueError:
            choice.regrouped = channel
            for name in channel:
                replace_module(model, name, better[name])
        choice.notes.append(
            f"A8 everywhere misses the target: {len(choice.regrouped)} layers change from scheme channel to group"
        )
    if choice.reached is None:
        worst = _error_of_quantization(model, reference, probes)
        floats = {layer.name: reference.get_submodule(layer.name) for layer in worst}
        choice.unquantized, choice.reached = replace_for_target(model, floats, score, worst, target)
        choice.notes.append(f"A8 everywhere misses the target: {len(choice.unquantized)} layers stay unquantized")
    choice.at_8 = [name for name in layers if places[name] not in choice.unquantized]


def _error_of_quantization(model: nn.Module, reference: nn.Module, probes) -> list[LayerSensitivity]:
    return with_whole_experts(model, sensitivity.estimate(model, reference, probes, "quantization"))


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Give a quantized model's layers the activations' bits of `plan`, in place."""
    for name, layer in quantized_layers(model).items():
        config = plan.config_for(name)
        if config is None or replace(config, act_bits=layer.config.act_bits) != layer.config:
            raise ValueError(f"plan and model differ in more than act_bits at layer {name}")
        layer.config = config
    model.flexq_plan = plan
    return model
