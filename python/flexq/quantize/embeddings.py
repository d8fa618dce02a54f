"""A model's token embedding: whether it can be quantized, and the `flexq.Embedding` that takes its place.

Of a model's embeddings it is the one that `get_input_embeddings` gives. Those of positions and token types, and those
of each layer, stay as they are.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.embedding import CONFIG, Embedding
from flexq.plan import LayerConfig, Plan
from flexq.quantize.layers import input_embeddings, lm_head_name, name_of, output_embeddings, replace_module

# Of an LM head that is tied to the embedding, where a plan does not name it.
_TIED_HEAD = {"weight_bits": 8, "act_bits": 8, "scheme": "channel"}


def embedding_name(model: nn.Module, plan: Plan) -> str | None:
    """The name of the model's token embedding, if the plan quantizes it.

    Raises:
        ValueError: it cannot be quantized, or the plan says something else of it in `layers`.
    """
    module = input_embeddings(model)
    name = name_of(model, module)
    if plan.embeddings is None:
        if name in plan.layers and isinstance(module, (nn.Embedding, Embedding)):
            raise ValueError(f'plan names {name!r}, the token embedding; "embeddings": 8 quantizes it, not its name')
        return None
    if name is None:
        raise ValueError(f"embeddings cannot be quantized: {type(model).__name__} says of no module that it is theirs")
    scaling_of(name, module)
    for other, m in _sharing(model).items():
        if other != name and m is not output_embeddings(model):
            raise ValueError(
                f"embedding {name} cannot be quantized: {other} has the same weight; only an LM head may share it"
            )
    if name in plan.layers and (plan.layers[name] is None or plan.layers[name].weight_bits != plan.embeddings):
        raise ValueError(f"plan has {plan.embeddings} bits for embeddings, and other settings for {name!r}")
    return name


def _sharing(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have the token embedding's weight, or will have once transformers has loaded it, by name."""
    embedding, modules = input_embeddings(model), dict(model.named_modules(remove_duplicate=False))
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return {}
    sharing = {name: m for name, m in modules.items() if m is embedding or getattr(m, "weight", None) is weight}
    if weight.is_meta:
        for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            names = [key.removesuffix(".weight") for key in pair]
            if any(name in sharing for name in names):
                sharing |= {name: modules[name] for name in names if name in modules}
    return sharing


def scaling_of(name: str, module: nn.Module) -> tuple[float | None, bool]:
    """What an embedding multiplies the rows that it looks up with, if anything, and whether that is rounded to their
    dtype first.

    Raises:
        ValueError: it does something else with them, or is no embedding in floating point.
    """
    kind = type(module)
    if isinstance(module, Embedding):
        raise ValueError(f"embedding {name} is quantized already")
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"embedding {name} cannot be quantized: it must be an nn.Embedding, got {kind.__name__}")
    if module.max_norm is not None:
        raise ValueError(f"embedding {name} cannot be quantized: its lookups change it (max_norm {module.max_norm})")
    if kind is nn.Embedding:
        return None, False
    given = getattr(module, "embed_scale", None)
    factor = getattr(module, "scalar_embed_scale", given)
    if isinstance(factor, torch.Tensor):
        factor = None if factor.is_meta or factor.numel() != 1 else factor.item()
    is_alone = [own for own, _ in module.named_parameters()] == ["weight"]
    rounds = _rounds_scale(module) if is_alone and (given is None or factor is not None) else None
    if rounds is None:
        raise ValueError(
            f"embedding {name} cannot be quantized: {kind.__name__} does more than look up rows and multiply them with "
            "embed_scale"
        )
    return (None if factor is None else float(factor)), rounds


def _rounds_scale(module: nn.Embedding) -> bool | None:
    """Whether the factor is rounded first; None where rows are not what comes out, times the factor. By what the class
    does: a small one is asked."""
    given, factor = getattr(module, "embed_scale", None), 1.7
    small = copy.copy(module)
    small.padding_idx = None
    with torch.device("cpu"), torch.no_grad():
        rows, ids = torch.linspace(-1, 1, 24, dtype=torch.bfloat16).view(3, 8), torch.tensor([[2, 0]])
        small._parameters, small._buffers = {**module._parameters, "weight": nn.Parameter(rows)}, dict(module._buffers)
        if isinstance(given, torch.Tensor):
            small._buffers["embed_scale"] = torch.tensor(factor, dtype=torch.float32)
        elif given is not None:
            small.embed_scale = factor
        else:
            factor = 1.0
        try:
            y = small.forward(ids)  # without hooks
        except Exception:  # whatever a class makes of a module that is not whole
            return None
        expected = {False: rows[ids] * factor, True: rows[ids] * torch.tensor(factor, dtype=rows.dtype)}
    if not isinstance(y, torch.Tensor) or y.dtype != rows.dtype:
        return None
    return next((rounds for rounds, rows in expected.items() if torch.equal(y, rows)), None)


# ---- Tied LM heads ---------------------------------------------------------------------------------------------------


def without_embedding(model: nn.Module, plan: Plan, name: str | None) -> Plan:
    """A plan for linear layers and experts: without the embedding that it quantizes, which is of this name, and with an
    LM head tied to that."""
    if name is None:
        return plan
    layers = {layer: config for layer, config in plan.layers.items() if layer != name}
    head = _tied_head(model)
    if head is not None and head != lm_head_name(model):
        raise ValueError(f"embedding {name} and {head} share a weight, and {head} is no layer that can be quantized")
    if head is not None and head not in layers:
        layers[head] = replace(plan.defaults, **_TIED_HEAD)
    return replace(plan, layers=layers, embeddings=None)


def require_tied_head(model: nn.Module, name: str | None, resolved: Mapping[str, LayerConfig]) -> None:
    """ValueError where an LM head would stay that has the weight of the embedding of this name, to be quantized."""
    head = _tied_head(model)
    if name is not None and head is not None and head not in resolved:
        raise ValueError(
            f"embedding {name} and {head} share a weight, which would be stored for {head} besides; quantize both or "
            "none"
        )


def _tied_head(model: nn.Module) -> str | None:
    """The LM head's name, if its weight is the embedding's."""
    head = output_embeddings(model)
    return next((name for name, m in _sharing(model).items() if m is head), None)


# ---- Quantizing ------------------------------------------------------------------------------------------------------


def empty_embedding(name: str, module: nn.Module) -> Embedding:
    """A `flexq.Embedding` for the place of an embedding, on the meta device. ValueError as of `scaling_of`."""
    scale, rounds = scaling_of(name, module)
    n, k = module.weight.shape
    made = Embedding(n, k, module.padding_idx, scale, rounds, "meta", module.weight.dtype)
    return made.train(module.training)


def quantize_embedding(name: str, module: nn.Module, weight: torch.Tensor | None = None) -> tuple[Embedding, int]:
    """What takes an embedding's place, and how many scales vanished.

    Args:
        name: of the embedding.
        module: that it is.
        weight: [N, K], where the module's own is not in memory.

    Raises:
        ValueError: weights that are not finite, or as of `scaling_of`.
    """
    weight = module.weight.detach() if weight is None else weight
    try:
        planes, scales = ops.quantize_weight(weight, CONFIG.scheme, CONFIG.rotation, CONFIG.weight_bits)
    except ValueError as error:
        raise ValueError(f"embedding {name}: {error}") from None
    embedding = empty_embedding(name, module).set_canonical(planes, scales)
    return embedding.prepack(), ops.count_vanished(weight, scales)


def add_embedding(model: nn.Module, name: str, embedding: Embedding, vanished: int, record: dict[str, Any]) -> None:
    """Put a quantized token embedding into a calibrated model, whose record says what scales vanished."""
    replace_module(model, name, embedding)
    if vanished:
        record["vanished_scales"] = record.get("vanished_scales", 0) + vanished
