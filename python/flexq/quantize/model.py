"""`quantize_model`: replaces the linear layers and experts of a model in place."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from flexq import ops
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.progress import Progress
from flexq.quantize.embeddings import embedding_name, quantize_embedding, require_tied_head, without_embedding
from flexq.quantize.experts import PROJECTIONS, kind_of, module_of, replacement, round_experts, whole_of
from flexq.quantize.layers import (
    as_linear,
    expert_layers,
    forget_ties,
    identity,
    is_linear,
    linear_layers,
    lm_head_name,
    matches,
    output_embeddings,
    record_plan,
    replace_module,
    some,
    untie_lm_head,
    warn_of_hooks,
)
from flexq.quantize.report import coverage

# Called with a model once it is quantized. flexq.integrations.transformers registers what lets `save_pretrained` know.
on_quantized: list[Callable[[nn.Module, Plan], None]] = []


class Resolved(NamedTuple):
    """What a plan quantizes of a model.

    Args:
        layers: the settings of each linear layer and projection of experts.
        embedding: the name of the token embedding, if that is quantized too.
    """

    layers: dict[str, LayerConfig]
    embedding: str | None


def resolve_plan(
    model: nn.Module,
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> Resolved:
    """What `quantize_model` would replace.

    Raises:
        ValueError: no layer is left to quantize, a pattern matches nothing, the plan names layers that do not exist, or
            quantizes an embedding that cannot be.
    """
    include = [include] if isinstance(include, str) else include
    skip = [skip] if isinstance(skip, str) else skip
    given, lm_head = Plan.of(plan), lm_head_name(model)
    embedding = embedding_name(model, given)
    plan = without_embedding(model, given, embedding)
    if lm_head not in plan.layers:
        lm_head = None  # quantized only where a plan names it, not where a pattern matches it
    named = {name for name, config in plan.layers.items() if config is not None}
    wholes = {name: whole_of(name) for name in expert_layers(model, ["*"])}

    def names_of(layer: str) -> tuple[str, ...]:
        return (layer, wholes[layer]) if layer in wholes else (layer,)

    if is_linear(model):
        raise ValueError(
            "the model is a linear layer itself, which cannot be replaced; flexq.Linear.from_float makes one"
        )
    every = linear_layers(model, lm_head=lm_head) | expert_layers(model)
    # With vision and audio parts, and routers.
    beside = linear_layers(model, ["*"], lm_head=lm_head) | expert_layers(model, ["*"])
    every |= {name: module for name, module in beside.items() if named.intersection(names_of(name))}
    for pattern in (*(include or ()), *skip):
        if not any(matches(names_of(name), [pattern]) for name in beside):
            raise ValueError(f"pattern {pattern!r} matches no linear layer; the model's are {some(every)}")
    chosen = linear_layers(model, include, skip, lm_head) | expert_layers(model, include, skip)
    if include is None:
        chosen |= {name: module for name, module in every.items() if not matches(names_of(name), skip)}
    # A recorded plan names all that was left: routers, which are linear only beside others, and parameters.
    known = {**every, **chosen}
    left = {n for n, config in plan.layers.items() if config is None and n not in known and _is_part(model, n)}
    plan = replace(plan, layers={name: config for name, config in plan.layers.items() if name not in left})
    settings = plan.resolve(known, wholes)
    resolved = {name: config for name, config in settings.items() if name in chosen and config is not None}
    _require_both(resolved, wholes)
    require_tied_head(model, embedding, resolved)
    if not resolved:
        quantized = sum(getattr(m, "is_flexq_layer", False) for m in model.modules())
        reason = f"{quantized} layers are quantized already" if quantized else f"its linear layers are {some(every)}"
        raise ValueError(f"no layer of the model was left to quantize; {reason}")
    gone = {f"{name}.weight" for name in (*resolved, *([] if embedding is None else [embedding]))}
    if embedding is not None and hasattr(model, "config") and all(n in gone for n, _ in model.named_parameters()):
        raise ValueError(
            "with the embedding quantized nothing of the model is left in floating point, from which transformers "
            "takes its dtype and device; leave the embedding as it is"
        )
    return Resolved(resolved, embedding)


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether the model has a module of this name, or a parameter."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name in dict(model.named_parameters())
    return True


def _require_both(resolved: dict[str, LayerConfig], wholes: dict[str, str]) -> None:
    """ValueError for experts of which one projection is to be quantized and the other not."""
    for name in resolved:
        if name in wholes and (left := [n for n, w in wholes.items() if w == wholes[name] and n not in resolved]):
            raise ValueError(
                f"experts {wholes[name]} are quantized as a whole, and {left[0]} is left out; leave out or include "
                f"both projections, by a pattern like '*.experts'"
            )


def finish_quantized(model: nn.Module, plan: Plan, **produced_by: Any) -> nn.Module:
    """What every way of quantizing a model in memory ends with: it knows its plan, and warns of what was left alone."""
    if isinstance(output_embeddings(model), Linear):
        untie_lm_head(model)
    forget_ties(model)
    model.flexq_plan = record_plan(model, plan)
    model.flexq_plan.produced_by.update(produced_by)
    if hasattr(model, "config"):
        model.config._is_quantized = True  # as transformers marks what it loads: code of some models (Jamba) asks
    for tell in on_quantized:
        tell(model, model.flexq_plan)
    warning = coverage(model).warning
    if warning:
        warnings.warn(warning, stacklevel=3)
    return model


def quantize_model(
    model: nn.Module,
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> nn.Module:
    """Quantize the linear layers and experts of `model` in place, and return it.

    The LM head and routers of experts stay as they are, unless the plan names them, and so does the token embedding,
    unless the plan has `embeddings`.

    A layer that appears at several names is quantized once and stays shared. If one cannot be quantized, or the work is
    interrupted, the model is left as it was; for that, the float weights are kept until all layers are done.
    `flexq.quantize_checkpoint` does without, layer by layer, for models larger than memory.

    `flexq.quantize.report.coverage(model)` says which share of the weights is quantized; below 80% of what is neither
    embedding nor LM head, a warning names the largest weights that are not.

    Args:
        model: a module on the CPU or a CUDA device.
        plan: a `Plan`, a recipe's name ("w6a8", "w6a6", "paper"), a plan's JSON file or object.
        include: patterns as in `fnmatch`; if given, only layers that match one.
        skip: patterns of layers to leave in floating point.
        progress: wraps the loop over layers, e.g. `tqdm.tqdm`.

    Returns:
        The model, its resolved plan as `model.flexq_plan`. A transformers model's config has it too, so that its
        `save_pretrained` writes a checkpoint that `from_pretrained` loads.

    Raises:
        ValueError: nothing to quantize, patterns or plan entries that match nothing, or a weight that cannot be
            quantized (NaN, Inf, not in memory); the message names the layer.
    """
    plan = Plan.of(plan)
    resolved, embedding = resolve_plan(model, plan, include, skip)
    warn_of_hooks(model, resolved)
    before: dict[str, nn.Module] = {}
    done: dict[tuple[tuple[int, ...], LayerConfig | tuple[LayerConfig, ...]], nn.Module] = {}
    vanished = 0
    try:
        for name in progress(list(resolved)) if progress else resolved:
            module = module_of(model, name)
            if isinstance(module, Experts):
                continue  # by its other projection
            require_in_memory(name, module)
            place = name if kind_of(module) is None else whole_of(name)
            config = resolved[name] if place == name else tuple(resolved[f"{place}.{p}"] for p in PROJECTIONS)
            quantized = _quantized if place == name else _quantized_experts
            key = (identity(module), config)
            if key not in done:
                done[key], lost = quantized(place, module, config)
                vanished += lost
            before[place] = module
            replace_module(model, place, done[key])
        if embedding is not None:
            module = model.get_submodule(embedding)
            require_in_memory(embedding, module)
            quantized, lost = quantize_embedding(embedding, module)
            vanished += lost
            before[embedding] = module
            replace_module(model, embedding, quantized)
    except BaseException:
        for name, module in before.items():
            replace_module(model, name, module)
        raise
    record = {"vanished_scales": vanished} if vanished else {}
    return finish_quantized(model, plan, **record)


def _quantized(name: str, module: nn.Module, config: LayerConfig) -> tuple[Linear, int]:
    """A linear layer rounded to nearest, and how many scales vanished."""
    linear = as_linear(module)
    try:
        planes, scales = ops.quantize_weight(linear.weight.detach(), config.scheme, config.rotation, config.weight_bits)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    return Linear.from_canonical(planes, scales, linear, config), ops.count_vanished(linear.weight, scales)


def _quantized_experts(whole: str, module: nn.Module, configs: tuple[LayerConfig, LayerConfig]) -> tuple[Experts, int]:
    """Experts rounded to nearest, and how many scales vanished."""
    canonical, vanished = [], 0
    for projection, config in zip(PROJECTIONS, configs, strict=True):
        weight = kind_of(module).oriented(getattr(module, projection))
        planes, scales, lost = round_experts(f"{whole}.{projection}", weight, config)
        canonical.append((planes, scales))
        vanished += lost
    return replacement(module, *canonical, configs), vanished


def require_in_memory(name: str, module: nn.Module) -> None:
    """ValueError for a layer whose weight is on the meta device: offloaded, or never loaded."""
    weights = [module.weight] if kind_of(module) is None else [module.gate_up_proj, module.down_proj]
    if any(weight.device.type == "meta" for weight in weights):
        raise ValueError(
            f"layer {name}: its weight is not in memory (offloaded, or on the meta device); load the model without "
            "offloading, or quantize the checkpoint from disk to disk with flexq.quantize_checkpoint"
        )
