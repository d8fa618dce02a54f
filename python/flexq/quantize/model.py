"""`quantize_model`: replaces the linear layers of a model in place."""

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from flexq import ops
from flexq.linear import Linear
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.progress import Progress
from flexq.quantize.layers import (
    as_linear,
    linear_layers,
    lm_head_name,
    output_embeddings,
    record_plan,
    replace_module,
    some,
    untie_lm_head,
)
from flexq.quantize.report import coverage

# Called with a model once it is quantized. flexq.integrations.transformers registers what lets `save_pretrained` know.
on_quantized: list[Callable[[nn.Module, Plan], None]] = []


def resolve_plan(
    model: nn.Module,
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> dict[str, LayerConfig]:
    """What `quantize_model` would do: the settings of each layer that it would replace.

    Raises:
        ValueError: no layer is left to quantize, a pattern matches nothing, or the plan names layers that do not exist.
    """
    plan, lm_head = Plan.of(plan), lm_head_name(model)
    if lm_head not in plan.layers:
        lm_head = None  # quantized only where a plan names it, not where a pattern matches it
    named = [name for name, config in plan.layers.items() if config is not None]
    every = linear_layers(model, lm_head=lm_head)
    beside = linear_layers(model, ["*"], lm_head=lm_head)  # with vision and audio parts
    every |= {name: beside[name] for name in named if name in beside}
    for pattern in (*(include or ()), *skip):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in beside):
            raise ValueError(f"pattern {pattern!r} matches no linear layer; the model's are {some(every)}")
    chosen = linear_layers(model, include, skip, lm_head)
    if include is None:
        chosen |= {n: m for n, m in every.items() if not any(fnmatch.fnmatchcase(n, p) for p in skip)}
    resolved = {n: c for n, c in plan.resolve({**every, **chosen}).items() if n in chosen and c is not None}
    if not resolved:
        quantized = sum(isinstance(m, Linear) for m in model.modules())
        reason = f"{quantized} layers are quantized already" if quantized else f"its linear layers are {some(every)}"
        raise ValueError(f"no layer of the model was left to quantize; {reason}")
    return resolved


def finish_quantized(model: nn.Module, plan: Plan, **produced_by: Any) -> nn.Module:
    """What every way of quantizing a model in memory ends with: it knows its plan, and warns of what was left alone."""
    if isinstance(output_embeddings(model), Linear):
        untie_lm_head(model)
    model.flexq_plan = record_plan(model, plan)
    model.flexq_plan.produced_by.update(produced_by)
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
    """Quantize the linear layers of `model` in place, and return it: all but the LM head, unless the plan names it.

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
    resolved = resolve_plan(model, plan, include, skip)
    before: dict[str, nn.Module] = {}
    done: dict[tuple[int, LayerConfig], Linear] = {}
    vanished = 0
    try:
        for name in progress(list(resolved)) if progress else resolved:
            module, config = model.get_submodule(name), resolved[name]
            key = (id(module), config)
            if key not in done:
                require_in_memory(name, module)
                linear = as_linear(module)
                try:
                    planes, scales = ops.quantize_weight(linear.weight.detach(), config.scheme, config.rotation)
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from None
                vanished += ops.count_vanished(linear.weight, scales)
                done[key] = Linear.from_canonical(planes, scales, linear, config)
            before[name] = module
            replace_module(model, name, done[key])
    except BaseException:
        for name, module in before.items():
            replace_module(model, name, module)
        raise
    record = {"vanished_scales": vanished} if vanished else {}
    return finish_quantized(model, Plan.of(plan), **record)


def require_in_memory(name: str, module: nn.Module) -> None:
    """ValueError for a layer whose weight is on the meta device: offloaded, or never loaded."""
    if module.weight.device.type == "meta":
        raise ValueError(
            f"layer {name}: its weight is not in memory (offloaded, or on the meta device); load the model without "
            "offloading, or quantize the checkpoint from disk to disk with flexq.quantize_checkpoint"
        )
