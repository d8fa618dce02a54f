"""A quantized transformers model back in floating point, with the weights that its codes stand for."""

import copy

import torch
from torch import nn

from flexq.embedding import Embedding
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.quantize.experts import PROJECTIONS, kind_of
from flexq.quantize.layers import replace_module


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put the layers of the model's class into the places of quantized ones, and return the model.

    Args:
        model: of transformers, not fused.
        dtype: of the weights, and of the parameters that are in the layers' own now; None keeps each layer's. Buffers,
            and what is kept in another dtype on purpose, stay as they are.

    Raises:
        ValueError: weights are not in memory; the model is left as it was.
    """
    with torch.device("meta"):
        empty = type(model)(_as_loaded(copy.deepcopy(model.config)))
    done: dict[int, nn.Module] = {}
    own_dtypes: set[torch.dtype] = set()
    places: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (Linear, Embedding, Experts)):
            if module.device.type == "meta":
                raise ValueError(f"layer {name}: its weight is not in memory")
            place = empty.get_submodule(name).train(module.training)
            if id(module) not in done:
                own_dtypes.add((module.down_proj if isinstance(module, Experts) else module).weight_dtype)
                fill = next(fill for kind, fill in _FILLS.items() if isinstance(module, kind))
                done[id(module)] = fill(place, module, dtype)
            for key, parameter in done[id(module)].named_parameters(recurse=False):  # shared where layers are tied
                setattr(place, key, parameter)
            places[name] = place
    for name, module in places.items():
        replace_module(model, name, module)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.dtype in own_dtypes:
                parameter.data = parameter.data.to(dtype)
    return model


def _as_loaded(config):
    """A configuration whose dtypes are what they were before `save_pretrained`, which makes them strings."""
    if isinstance(config.dtype, str):
        config.dtype = getattr(torch, config.dtype)
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            _as_loaded(getattr(config, name))
    return config


def _fill_linear(place: nn.Module, layer: Linear, dtype: torch.dtype | None) -> nn.Module:
    weight = layer.dequantize(dtype or layer.weight_dtype)
    place.weight = nn.Parameter(weight if isinstance(place, nn.Linear) else weight.T.contiguous())
    if layer.bias is not None:
        place.bias = nn.Parameter(layer.bias.detach().clone())
    return place


def _fill_embedding(place: nn.Module, embedding: Embedding, dtype: torch.dtype | None) -> nn.Module:
    place.weight = nn.Parameter(embedding.dequantize(dtype or embedding.weight_dtype))
    if isinstance(getattr(place, "embed_scale", None), torch.Tensor):
        place.embed_scale = torch.tensor(embedding.embed_scale, device=embedding.device)
    return place


def _fill_experts(place: nn.Module, experts: Experts, dtype: torch.dtype | None) -> nn.Module:
    kind = kind_of(place)
    for name, weight in zip(PROJECTIONS, experts.dequantize(dtype or experts.down_proj.weight_dtype), strict=True):
        setattr(place, name, nn.Parameter(kind.oriented(weight).contiguous()))
        if kind.bias:
            setattr(place, f"{name}_bias", nn.Parameter(getattr(experts, name).bias.detach().clone()))
    return place


_FILLS = {Linear: _fill_linear, Embedding: _fill_embedding, Experts: _fill_experts}
