"""`quantize_model`: replaces the linear layers of a model in place."""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from flexq.linear import Linear
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps a sequence to show how far a loop over it is, as `tqdm.tqdm` does."""


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """A transformers model's LM head, if it has one."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def lm_head_name(model: nn.Module) -> str | None:
    """The layer that turns the last hidden states into logits, if it is an `nn.Linear`."""
    head = output_embeddings(model)
    for name, module in model.named_modules():
        is_head = module is head if head is not None else name.rpartition(".")[2] == "lm_head"
        if is_head and type(module) is nn.Linear:
            return name
    return None


def untie_lm_head(model: nn.Module) -> None:
    """Once the LM head is quantized: it has a weight of its own, whatever the embeddings are."""
    config = getattr(model, "config", None)
    if config is not None:
        config.get_text_config(decoder=True).tie_word_embeddings = False
        config.tie_word_embeddings = False


def _embedding_weights(model: nn.Module) -> set[int]:
    """Storage of the embeddings and of the LM head."""
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = output_embeddings(model)
    if head is not None:
        modules.append(head)
    return {id(m.weight) for m in modules if getattr(m, "weight", None) is not None}


def linear_layers(
    model: nn.Module, include: Sequence[str] | None = None, skip: Sequence[str] = (), lm_head: str | None = None
) -> dict[str, nn.Linear]:
    """The layers that `quantize_model` would replace, by name, in the model's order.

    These are the modules whose type is exactly `nn.Linear`, less the LM head and layers whose weight is an embedding's.

    Args:
        model: any module; transformers models say what their LM head is, elsewhere it is a layer named "lm_head".
        include: patterns as in `fnmatch`; if given, only layers that match one.
        skip: patterns; layers that match one are left alone.
        lm_head: its name, to have it among them.
    """
    kept = _embedding_weights(model)
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear:
            continue
        if name != lm_head and (id(module.weight) in kept or name.rpartition(".")[2] == "lm_head"):
            continue
        if include is not None and not any(fnmatch.fnmatchcase(name, p) for p in include):
            continue
        if not any(fnmatch.fnmatchcase(name, p) for p in skip):
            layers[name] = module
    return layers


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
    every = linear_layers(model, lm_head=lm_head)
    for pattern in (*(include or ()), *skip):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in every):
            raise ValueError(f"pattern {pattern!r} matches no linear layer; the model's are {_some(every)}")
    chosen = linear_layers(model, include, skip, lm_head)
    resolved = {n: c for n, c in plan.resolve(every).items() if n in chosen and c is not None}
    if not resolved:
        quantized = sum(isinstance(m, Linear) for m in model.modules())
        reason = f"{quantized} layers are quantized already" if quantized else f"its linear layers are {_some(every)}"
        raise ValueError(f"no layer of the model was left to quantize; {reason}")
    return resolved


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    if not listed:
        return "none (only plain nn.Linear modules other than the LM head count)"
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
    `flexq.checkpoint.quantize_checkpoint` does without, layer by layer, for models larger than memory.

    Args:
        model: a module on the CPU or a CUDA device.
        plan: a `Plan`, a recipe's name ("w6a8", "w6a6", "paper"), a plan's JSON file or object.
        include: patterns as in `fnmatch`; if given, only layers that match one.
        skip: patterns of layers to leave in floating point.
        progress: wraps the loop over layers, e.g. `tqdm.tqdm`.

    Returns:
        The model, its resolved plan as `model.flexq_plan`.

    Raises:
        ValueError: nothing to quantize, patterns or plan entries that match nothing, or a weight that cannot be
            quantized (NaN, Inf); the message names the layer.
    """
    resolved = resolve_plan(model, plan, include, skip)
    before: dict[str, nn.Linear] = {}
    done: dict[tuple[int, LayerConfig], Linear] = {}
    try:
        for name in progress(list(resolved)) if progress else resolved:
            linear, config = model.get_submodule(name), resolved[name]
            key = (id(linear), config)
            if key not in done:
                try:
                    done[key] = Linear.from_float(linear, config)
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from None
            before[name] = linear
            replace_module(model, name, done[key])
    except BaseException:
        for name, linear in before.items():
            replace_module(model, name, linear)
        raise
    if isinstance(output_embeddings(model), Linear):
        untie_lm_head(model)
    model.flexq_plan = record_plan(model, Plan.of(plan))
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer: patching it leaves `model` as it is."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo |= {id(m): m for m in model.modules() if isinstance(m, Linear)}
    return copy.deepcopy(model, memo)


def record_plan(model: nn.Module, plan: Plan) -> Plan:
    """The plan of a quantized model: its layers by name, as they are."""
    layers: dict[str, LayerConfig | None] = {name: None for name in linear_layers(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear):
            layers[name] = module.config
    return Plan(plan.defaults, layers, plan.produced_by)


def linear_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the linear weights (LM head excluded) as stored on disk and as resident in memory."""
    stored = resident = 0
    for module in model.modules():
        if hasattr(module, "weight_bytes"):
            stored += module.stored_bytes
            resident += module.weight_bytes
    for linear in {id(m): m for m in linear_layers(model).values()}.values():
        size = linear.weight.numel() * linear.weight.element_size()
        stored += size
        resident += size
    return stored, resident
