"""Plans of several weight widths: from a mean number of bits, a size or a target, and what they turn out to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear
from flexq.ops import WEIGHT_BITS
from flexq.plan import LayerConfig, Plan
from flexq.planning import widths
from flexq.planning.costs import WidthCosts
from flexq.planning.sensitivity import Divergence
from flexq.planning.widths import Price, Widths, WidthSensitivity
from flexq.progress import Progress
from flexq.quantize.embeddings import empty_embedding
from flexq.quantize.experts import PROJECTIONS
from flexq.quantize.layers import input_embeddings, lm_head_name, weight_at
from flexq.quantize.model import resolve_plan

# Of the recipe `best`.
BEST_ALPHA, HEAD_BITS = 0.25, 8
# What is measured, as a share of the estimate: where a search for a target begins.
_FIRST_SHARE = 1.0
_TRIES = 4
# A target is met by a model that is not more faithful than by this share of it.
_NEAR = 0.85
# Widths by layer are taken if the estimate promises this share of the KL less than one width everywhere has. Two
# calibrations differ by about as much (docs/results/accuracy.md).
_WORTHWHILE = 0.1


def with_head(model: nn.Module, plan: Plan, bits: int | None = HEAD_BITS) -> Plan:
    """The plan with the model's LM head at these weight bits, or left alone (None), if it has one and the plan does not
    name it."""
    head = lm_head_name(model)
    if head is None or head in plan.layers:
        return plan
    config = None if bits is None else replace(plan.defaults, weight_bits=bits)
    return replace(plan, layers={**plan.layers, head: config})


def chosen_layers(
    model: nn.Module, plan: Plan, include: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> dict[str, LayerConfig]:
    """The layers whose weight bits are to be chosen: all that a plan quantizes but the LM head."""
    head = lm_head_name(model)
    return {name: config for name, config in resolve_plan(model, plan, include, skip).layers.items() if name != head}


@dataclass
class Mixed:
    """How the weight bits of a model's layers can be chosen.

    Args:
        plan: settings of all layers but for their weight bits.
        resolved: the same, layer by layer.
        ranking: of `widths.estimate`; of the layers whose width is chosen. The plan's is that of the LM head, and of
            layers that the estimate does not see, as nothing that it looks at depends on them.
        groups: layers that get one width.
        fixed_bytes: of the other layers as stored, and of a token embedding that the plan quantizes.
        costs: of the layers in `ranking` on a device, if what a plan may cost is time and not bits.
    """

    plan: Plan
    resolved: dict[str, LayerConfig]
    ranking: list[WidthSensitivity]
    groups: list[list[str]]
    fixed_bytes: int = 0
    costs: WidthCosts | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        windows: Sequence[torch.Tensor],
        plan: Plan,
        include: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        progress: Progress | None = None,
        device: torch.device | str | None = None,
        calibrate: Callable[[Plan], nn.Module] | None = None,
        costs: WidthCosts | None = None,
    ) -> "Mixed":
        """Estimate what each width costs each layer of a model in floating point.

        Args:
            model: not quantized.
            windows: token ids [1, L] each, on which that is estimated; a few of 512 do.
            plan, include, skip: as for `quantize_model`; the plan's weight bits do not matter but for the LM head.
            progress: wraps the loop over windows.
            device: as for `fisher.backward`.
            calibrate: makes a model of a plan as the one to come is made, if need be on less text. Without, the
                estimate is that of weights rounded to nearest, whose errors are spread over layers otherwise.
            costs: of `measure_width_costs` for `chosen_layers`: plans are then of a time, on its device.
        """
        (resolved, embedding), head = resolve_plan(model, plan, include, skip), lm_head_name(model)
        left = dict.fromkeys(name for name, config in plan.layers.items() if config is None)
        at_6 = {name: replace(config, weight_bits=6) for name, config in resolved.items() if name != head}
        every = Plan(replace(plan.defaults, weight_bits=6), {**left, **at_6})
        models = widths.rounded_models(model, every, include, skip)
        calibrated = None if calibrate is None else calibrate(every)
        where = None if device is None else torch.device(device)
        ranking = widths.estimate(model, models, windows, progress, where, calibrated)
        fixed_bytes = sum(x.bytes[_width(resolved, x.name)] for x in ranking if not _is_seen(x))
        ranking = list(filter(_is_seen, ranking))
        if not ranking:
            raise ValueError("what the model makes of these windows depends on no layer whose width is to be chosen")
        if head in resolved:
            n, k = weight_at(model, head).shape
            fixed_bytes += Linear(k, n, False, resolved[head], "meta").stored_bytes
        if embedding is not None:
            fixed_bytes += empty_embedding(embedding, model.get_submodule(embedding)).stored_bytes
        return cls(plan, resolved, ranking, widths.groups_of(model, ranking), fixed_bytes, costs)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.ranking)

    @property
    def price(self) -> Price:
        return widths.in_bits if self.costs is None else widths.in_time(self.costs)

    def at_bits(self, bits: float) -> Widths:
        """The best widths of at most so many bits a weight, in the mean over all layers but the LM head; with costs,
        those that take at most the time of so many bits everywhere, which is linear between two widths. One width
        everywhere where others are hardly better."""
        return self._within(widths.uniform_price(self.ranking, bits, self.price), self.price)

    def at_bytes(self, size: float) -> Widths:
        """The same of widths whose layers, stored, have at most so many bytes, scales included."""
        return self._within(size, widths.in_bytes)

    def _within(self, budget: float, price: Price) -> Widths:
        """The best widths that a budget covers, or the best of one width everywhere if that is nearly as good."""
        best = widths.solve(self.ranking, self.groups, budget, price)
        uniform = [widths.everywhere(self.ranking, width, price) for width in self.ranking[0].kl]
        covered = (one for one in uniform if widths.covers(budget, one.price))
        plain = min(covered, key=lambda one: one.kl, default=None)
        return best if plain is None or best.kl < (1 - _WORTHWHILE) * plain.kl else plain

    def at_kl(self, kl: float) -> Widths:
        """The cheapest widths whose estimated KL is at most this; the most faithful ones, where none is."""
        for point in widths.frontier(self.ranking, self.groups, self.price):
            if point.kl <= kl:
                break
        return point

    def plan_at(self, chosen: Widths, **how: Any) -> Plan:
        """A plan of these widths that says how it came about."""
        plan = widths.plan_of(self.plan, self.resolved, chosen.bits)
        bits = widths.mean_bits(self.ranking, chosen.bits)
        plan.produced_by.update({"mean_weight_bits": round(bits, 4), "estimated_kl": chosen.kl, **how})
        if self.costs is not None:
            time = widths.price_of(self.ranking, chosen.bits, self.price)
            about = {"tokens": self.costs.tokens, "device": self.costs.device}
            plan.produced_by.update({"budget_of": "time", "microseconds": round(time, 1), **about})
        return plan

    def for_target(
        self, target: float, quantize: Callable[[Plan], nn.Module], divergence: Divergence
    ) -> tuple[nn.Module, float]:
        """The cheapest model found whose measured KL divergence is at most `target`, and its divergence.

        The estimate says how widths compare, a few quantized models how it compares with what is measured.

        Args:
            target: nats a token.
            quantize: makes a model of a plan.
            divergence: from the unquantized model.

        Raises:
            ValueError: the most faithful widths miss it too; says how near they come.
        """
        share, best, tried = _FIRST_SHARE, None, set()
        for _ in range(_TRIES):
            chosen = self.at_kl(target / share)
            if chosen.price in tried:
                break
            tried.add(chosen.price)
            model = quantize(self.plan_at(chosen, target_kl=target))
            reached = divergence.mean(model)
            model.flexq_plan.produced_by["measured_kl"] = reached
            if reached <= target and (best is None or chosen.price < best[0]):
                best = chosen.price, model, reached
            if _NEAR * target <= reached <= target:
                break
            share *= max(reached, 1e-12) / (target * (0.5 + _NEAR / 2))
        if best is None:
            raise ValueError(f"a KL of {target} cannot be met: the nearest model tried has {reached:.4g}")
        return best[1:]


def _is_seen(layer: WidthSensitivity) -> bool:
    return any(layer.kl.values())


def _width(layers: Mapping[str, LayerConfig | None], name: str) -> int:
    """Of a layer, or of both projections of experts."""
    config = layers.get(name) or layers[f"{name}.{PROJECTIONS[0]}"]
    return config.weight_bits


def bytes_beside(
    model: nn.Module, plan: Plan, resolved: Mapping[str, LayerConfig], dtype: torch.dtype | None = None
) -> int:
    """Of what a checkpoint stores beside the layers that a plan quantizes: embeddings, norms, biases, other layers.

    Args:
        model: not quantized.
        plan: whether it quantizes the token embedding.
        resolved: the `layers` of `resolve_plan`.
        dtype: of floating point as stored; None for each tensor's own.
    """
    quantized = {id(weight_at(model, name)) for name in resolved}
    embedding = {id(getattr(input_embeddings(model), "weight", None))}
    # Stored in floating point unless it is quantized itself, though an LM head that is tied to it be.
    quantized = quantized - embedding if plan.embeddings is None else quantized | embedding

    def size(tensor: torch.Tensor) -> int:
        return (dtype or tensor.dtype).itemsize if tensor.is_floating_point() else tensor.element_size()

    return sum(p.numel() * size(p) for p in model.parameters() if id(p) not in quantized)


def summary(mixed: Mixed, plan: Plan) -> str:
    """How a plan spreads the weights over the widths, in a sentence."""
    chosen = {layer.name: _width(plan.layers, layer.name) for layer in mixed.ranking}
    sizes = {bits: sum(x.parameters for x in mixed.ranking if chosen[x.name] == bits) for bits in WEIGHT_BITS}
    parts = [f"{100 * size / mixed.parameters:.0f}% at {bits} bits" for bits, size in sizes.items() if size]
    said = f"weights: {', '.join(parts)}; {widths.mean_bits(mixed.ranking, chosen):.2f} bits in the mean"
    if mixed.costs is None:
        return said
    time = widths.price_of(mixed.ranking, chosen, mixed.price)
    at_6 = widths.uniform_price(mixed.ranking, 6, mixed.price)
    where = f"for {mixed.costs.tokens} tokens on {mixed.costs.device}"
    return f"{said}; {time:.0f} us {where}, where 6 bits everywhere take {at_6:.0f} us"
