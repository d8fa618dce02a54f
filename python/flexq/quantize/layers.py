"""Which layers of a model can be quantized, linear ones and experts, and putting other modules into their places."""

import copy
import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from flexq.embedding import Embedding
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.plan import LayerConfig, Plan
from flexq.quantize.experts import PROJECTIONS, experts_of, module_of, routers_of
from flexq.quantize.linearity import is_linear


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """A transformers model's LM head, if it has one."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """A transformers model's token embeddings, if it has such."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The first name of a module that is somewhere in the model; None of none."""
    return next((name for name, m in model.named_modules() if m is module), None) if module is not None else None


def lm_head_name(model: nn.Module) -> str | None:
    """The layer that turns the last hidden states into logits, if it is an `nn.Linear`."""
    head = output_embeddings(model)
    for name, module in model.named_modules():
        is_head = module is head if head is not None else name.rpartition(".")[2] == "lm_head"
        if is_head and type(module) is nn.Linear:
            return name
    return None


def untie_lm_head(model: nn.Module) -> None:
    """Once the LM head is quantized: it has a weight of its own, whatever the embeddings are. Of encoder-decoders the
    setting says more: that their embeddings are one, and (Switch Transformers) how hidden states are scaled; of others
    that blocks share their weights (Zamba 2)."""
    config = getattr(model, "config", None)
    if config is not None and not getattr(config, "is_encoder_decoder", False) and not _ties_more(model):
        config.get_text_config(decoder=True).tie_word_embeddings = False
        config.tie_word_embeddings = False


def _ties_more(model: nn.Module) -> bool:
    """Whether transformers ties more of a model than its LM head."""
    head = name_of(model, output_embeddings(model))
    for prefix, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        names = (f"{prefix}.{key}" if prefix else key for key in (keys if isinstance(keys, dict) else ()))
        if any(not name.startswith(f"{head}.") for name in names):
            return True
    return False


def _embedding_weights(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the LM head."""
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = output_embeddings(model)
    if head is not None:
        modules.append(head)
    return {id(m.weight) for m in modules if isinstance(getattr(m, "weight", None), torch.Tensor)}


# ---- Linear layers as matrices ---------------------------------------------------------------------------------------


def as_linear(module: nn.Module) -> nn.Linear:
    """A module for which `is_linear` holds as an `nn.Linear` of the same tensors."""
    if isinstance(module, nn.Linear):
        return module
    k, n = module.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
    linear.bias = module.bias
    return linear.train(module.training)


def weight_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A checkpoint's `weight` of such a module, or of an embedding, as [N, K]."""
    return tensor if isinstance(module, (nn.Linear, nn.Embedding)) else tensor.T


# ---- Finding and replacing -------------------------------------------------------------------------------------------


def _outside_language_model(model: nn.Module) -> tuple[str, ...]:
    """Of a model that combines several (vision or audio and language), the parts beside the language model: prefixes of
    names. They stay in floating point unless they are asked for."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return ()
    text = config.get_text_config(decoder=True)
    if text is config:
        return ()
    inside = [name for name, m in model.named_modules() if name and getattr(m, "config", None) is text]
    if not inside:
        return ()
    parts = []
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if name and own is not None and own is not text and own is not config:
            parts.append(name + ".")
    return tuple(p for p in parts if not any(name.startswith(p) for name in inside))


def linear_layers(
    model: nn.Module, include: Sequence[str] | None = None, skip: Sequence[str] = (), lm_head: str | None = None
) -> dict[str, nn.Module]:
    """The layers that `quantize_model` would replace, by name, in the model's order.

    These are the modules that are linear (`is_linear`), less the LM head, layers whose weight is an embedding's, and,
    unless a pattern of `include` names them, routers of experts and the vision and audio parts of models that have such
    beside a language model.

    Args:
        model: any module; transformers models say what their LM head is, elsewhere it is a layer named "lm_head".
        include: patterns as in `fnmatch`; if given, only layers that match one.
        skip: patterns; layers that match one are left alone.
        lm_head: its name, to have it among them.
    """
    kept, tied = _embedding_weights(model), getattr(model, "all_tied_weights_keys", None) or {}
    beside = _outside_language_model(model) if include is None else ()
    routers = routers_of(model) if include is None else ()
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module) or name.startswith(beside) or name in routers:
            continue
        if name != lm_head and (id(module.weight) in kept or name.rpartition(".")[2] == "lm_head"):
            continue
        # What transformers ties once it has loaded the model.
        source = tied.get(f"{name}.weight") if name != lm_head else None
        if source is not None and id(model.get_parameter(source)) in kept:
            continue
        if _wanted((name,), include, skip):
            layers[name] = module
    return layers


def expert_layers(
    model: nn.Module, include: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The projections of experts that `quantize_model` would replace, by name, and the module of experts each is of.

    Args:
        model, include, skip: as for `linear_layers`; a pattern matches a projection's name or that of the experts.
    """
    beside = _outside_language_model(model) if include is None else ()
    return {
        name: module
        for whole, module in experts_of(model).items()
        for name in (f"{whole}.{projection}" for projection in PROJECTIONS)
        if not whole.startswith(beside) and _wanted((name, whole), include, skip)
    }


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a pattern matches one of a layer's names."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _wanted(names: Sequence[str], include: Sequence[str] | None, skip: Sequence[str]) -> bool:
    return (include is None or matches(names, include)) and not matches(names, skip)


def weight_at(model: nn.Module, layer: str) -> torch.Tensor:
    """A layer's weight: [N, K] or, of a GPT-2 layer or of experts, as it is held."""
    module = module_of(model, layer)
    return module.weight if is_linear(module) else getattr(module, layer.rpartition(".")[2])


def left_alone(model: nn.Module) -> list[str]:
    """The layers that could be quantized and are not, routers among them, which are quantized only if asked for."""
    routers = [name for name in sorted(routers_of(model)) if is_linear(model.get_submodule(name))]
    return list(dict.fromkeys([*linear_layers(model), *routers, *expert_layers(model)]))


def some(names: Iterable[str]) -> str:
    """The first few of a list of layers, for a message."""
    listed = list(names)
    if not listed:
        return "none (only linear layers other than the LM head count)"
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def warn_of_hooks(model: nn.Module, layers: Iterable[str]) -> None:
    """Hooks on layers go with them when quantized ones take their places: a warning names the layers."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = [name for name in layers if any(vars(module_of(model, name)).get(kind) for kind in kinds)]
    if hooked:
        text = f"hooks go with the layers that are replaced; register them again on the quantized ones: {some(hooked)}"
        warnings.warn(text, stacklevel=3)


def identity(module: nn.Module) -> tuple[int, ...]:
    """Equal for modules that hold the same parameters: one that stands at several names, or several that transformers
    ties (the blocks that Zamba shares)."""
    return tuple(map(id, module.parameters(recurse=False)))


def identities(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of linear layers by name, what `identity` is once transformers has tied what it ties; a model that it loads
    weights into is not yet."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}

    def of(name: str) -> tuple[int, ...]:
        own = (f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters(recurse=False))
        return tuple(id(source(parameter)) for parameter in own)

    def source(parameter: str) -> nn.Parameter:
        try:
            return model.get_parameter(tied.get(parameter, parameter))
        except AttributeError:  # of an embedding that is quantized, and tied to nothing any more
            return model.get_parameter(parameter)

    return {name: of(name) for name in names}


def forget_ties(model: nn.Module) -> None:
    """Once layers are quantized: transformers ties nothing of them any more. Those that it tied are one `Linear`."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in [p for p in tied.items() if all(name.endswith(".weight") for name in p)]:
        if any(isinstance(model.get_submodule(name.removesuffix(".weight")), Linear) for name in pair):
            del tied[pair[0]]
            _keep_own_bias(model, pair[0].removesuffix(".weight"), tied)


def _keep_own_bias(model: nn.Module, name: str, tied: dict[str, str]) -> None:
    """A layer's bias that was tied too (BERT's head): transformers would neither save nor tie it."""
    layer = model.get_submodule(name)
    if tied.pop(f"{name}.bias", None) is not None and isinstance(layer, Linear) and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer: patching it leaves `model` as it is."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo |= {id(m): m for m in model.modules() if isinstance(m, (Linear, Experts, Embedding))}
    return copy.deepcopy(model, memo)


def record_plan(model: nn.Module, plan: Plan) -> Plan:
    """The plan of a quantized model: its layers by name, as they are, the token embedding among them."""
    layers: dict[str, LayerConfig | None] = dict.fromkeys(left_alone(model))
    for name, module in model.named_modules(remove_duplicate=False):
        config = getattr(module, "config", None)
        if isinstance(config, LayerConfig) and getattr(module, "is_flexq_layer", False):
            layers[name] = config
    embeddings = next((m.config.weight_bits for m in model.modules() if isinstance(m, Embedding)), None)
    return Plan(plan.defaults, layers, dict(plan.produced_by), embeddings)


def linear_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights of linear layers and experts (LM head excluded) as stored on disk and as resident in
    memory."""
    stored = resident = 0
    for module in model.modules():
        # Of experts, the projections are counted.
        if hasattr(module, "weight_bytes") and not isinstance(module, (Experts, Embedding)):
            stored += module.stored_bytes
            resident += module.weight_bytes
    for weight in {id(w): w for w in (weight_at(model, name) for name in left_alone(model))}.values():
        size = weight.numel() * weight.element_size()
        stored += size
        resident += size
    return stored, resident
