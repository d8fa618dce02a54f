"""A checkpoint's plan, and the empty layers that it puts into a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flexq.checkpoint.keys import is_own_class
from flexq.checkpoint.source import QUANT_METHOD, CheckpointError, one_line, quantization_of, read_json
from flexq.embedding import CONFIG
from flexq.linear import Linear
from flexq.plan import LayerConfig, Plan
from flexq.quantize.embeddings import empty_embedding
from flexq.quantize.experts import PROJECTIONS, kind_of, module_of, whole_of
from flexq.quantize.layers import as_linear, forget_ties, identities, is_linear, replace_module

FORMAT_VERSIONS = (1, 2)


def settings_of(plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint."""
    return {"quant_method": QUANT_METHOD, "format_version": _version_of(plan), "plan": plan.to_dict()}


def _version_of(plan: Plan) -> int:
    """The first version of the format that has what the plan does."""
    return 1 if plan.embeddings is None else 2


def plan_of_settings(settings: Mapping[str, Any]) -> Plan:
    """The plan in a checkpoint's `quantization_config`. ValueError for another version, or a plan that is no object."""
    version = settings.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(f"this checkpoint has FlexQ format version {version!r}; this FlexQ reads {known}")
    plan = settings.get("plan")
    if not isinstance(plan, Mapping):
        raise ValueError(f"a checkpoint's plan must be an object that names every layer, got {plan!r:.60}")
    plan = Plan.from_dict(plan)
    if _version_of(plan) > version:
        raise ValueError(f"this checkpoint has FlexQ format version {version}, which has no quantized embeddings")
    return plan


def read_plan(folder: str | Path) -> Plan:
    """The plan of a FlexQ checkpoint. CheckpointError for a folder that is none."""
    config = read_json(Path(folder) / "config.json")
    method = quantization_of(config)
    if method != QUANT_METHOD:
        found = "is not quantized" if method is None else f"was quantized by {method}"
        raise CheckpointError(f"{folder} {found}; a FlexQ checkpoint's config.json says quant_method {QUANT_METHOD}")
    try:
        return plan_of_settings(config["quantization_config"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from None


def insert_layers(model, plan: Plan) -> dict[str, LayerConfig]:
    """Replace what a checkpoint's plan names by empty `flexq.Linear`, `Embedding` and `Experts`, on the meta device.

    A base model loads a checkpoint of a model with a head, and the other way round.

    Raises:
        ValueError: the plan names a layer that the model does not have.
    """
    inserted: dict[str, LayerConfig] = {}
    layers: dict[str, LayerConfig] = {}
    experts: dict[str, LayerConfig] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    whole = is_own_class(model)
    for name, config in plan.layers.items():
        if config is None:
            continue
        module, own_name = None, name
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            try:
                module, own_name = module_of(model, candidate), candidate
                break
            except AttributeError:
                continue
        if module is None and not whole and not name.startswith(prefix):
            continue  # in a head that this class does not have
        if module is None:
            raise ValueError(f"the checkpoint's plan names layer {name!r}, which the model does not have")
        inserted[own_name] = config
        if kind_of(module) is not None:
            experts[own_name] = config
        elif plan.embeddings is not None and isinstance(module, nn.Embedding):
            if config != CONFIG:
                raise ValueError(
                    f"the checkpoint's plan has embedding {name!r} as {config}, and only {CONFIG} is known"
                )
            replace_module(model, own_name, empty_embedding(own_name, module))
        elif is_linear(module):
            layers[own_name] = config
        else:
            raise ValueError(f"the checkpoint's plan names layer {name!r}, which is a {type(module).__name__}")
    _insert_linear(model, layers)
    _insert_experts(model, experts)
    return inserted


def _insert_linear(model, layers: dict[str, LayerConfig]) -> None:
    done: dict[Any, Linear] = {}  # one for all that are tied to each other
    for name, which in identities(model, layers).items():
        config, linear = layers[name], as_linear(model.get_submodule(name))
        if (which, config) not in done:
            done[which, config] = Linear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                config,
                device="meta",
                dtype=linear.weight.dtype,
            )
        replace_module(model, name, done[which, config])
    forget_ties(model)


def _insert_experts(model, projections: dict[str, LayerConfig]) -> None:
    for name in projections:
        whole = whole_of(name)
        missing = [f"{whole}.{p}" for p in PROJECTIONS if f"{whole}.{p}" not in projections]
        if missing:
            raise ValueError(f"the checkpoint's plan names layer {name!r} of experts, and not {missing[0]!r}")
    for whole in dict.fromkeys(map(whole_of, projections)):
        module = model.get_submodule(whole)
        configs = [projections[f"{whole}.{p}"] for p in PROJECTIONS]
        empty = kind_of(module).empty(*configs, module.down_proj.dtype)
        replace_module(model, whole, empty.train(module.training))
