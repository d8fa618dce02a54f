"""A checkpoint's tensors on their way to vLLM's classes, by vLLM's usual loader: what FlexQ does to them in between, by
stages. One is here: a FlexQ checkpoint's are refused where the model has no place for them, dequantized where it has
plain layers, and come with their rows in the order that the class gives a weight's."""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from flexq import ops
from flexq.plan import LayerConfig

_OF_ROWS = ("qweight", "scales")
Weights = Iterator[tuple[str, torch.Tensor]]
WeightOf = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
logger = init_logger(f"vllm.plugins.{__name__}")


def config_of(model: torch.nn.Module):
    """FlexQ's configuration of a model; None if it has none."""
    for module in model.modules():
        config = getattr(module, "quant_config", None)  # of linear layers
        if hasattr(config, "embeddings_without_place"):
            return config
    return None


def have_loader_pass(stage: Callable[..., Weights]) -> None:
    """Has vLLM's usual loader give a checkpoint's tensors by `stage(weights, model_config, model)`, around the stages
    that it has already. May be called more than once."""
    inner = DefaultModelLoader.get_all_weights
    stages = getattr(inner, "flexq_stages", ())
    if stage in stages:
        return

    @wraps(inner)
    def get_all_weights(self, model_config, model: torch.nn.Module) -> Weights:
        return stage(inner(self, model_config, model), model_config, model)

    get_all_weights.flexq_stages = (*stages, stage)
    DefaultModelLoader.get_all_weights = get_all_weights


def prepared(weights: Weights, model_config, model: torch.nn.Module) -> Weights:
    """A FlexQ checkpoint's tensors once it is known that they have places, in the order of their class's rows."""
    config = config_of(model)
    if config is None or not config.is_checkpoint:
        return weights
    # A drafter may take a layer of the model's checkpoint (MTP).
    is_whole = getattr(model_config, "runner_type", None) != "draft"
    config.check_before_loading(model, is_whole)
    if is_whole:
        weights = _dequantized(weights, config.layers_without_place(), model_config)
    in_order = order_of_rows(model)
    return weights if in_order is None else ((name, in_order(name, tensor)) for name, tensor in weights)


def with_weights(weights: Weights, names: Iterable[str], weight_of: WeightOf) -> Weights:
    """A checkpoint's tensors, with weight_of(name, planes, scales) in place of the layers `names`."""
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for name, tensor in weights:
        layer, _, kind = name.rpartition(".")
        if layer not in parts or kind not in _OF_ROWS:
            yield name, tensor
            continue
        parts[layer][kind] = tensor
        if len(parts[layer]) == len(_OF_ROWS):
            yield f"{layer}.weight", weight_of(layer, *(parts[layer][kind] for kind in _OF_ROWS))


def _dequantized(weights: Weights, layers: dict[str, LayerConfig], model_config) -> Weights:
    """A checkpoint's tensors, with the weights of `layers` in floating point."""

    def weight_of(layer: str, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        logger.info_once(f"vLLM's class of this model has {layer} in floating point: it is dequantized")
        # The planes tell of groups of 128 inputs alone.
        hidden, groups = model_config.get_hidden_size(), planes.shape[1]
        k = hidden if ops.num_groups(hidden) == groups else groups * ops.GROUP_SIZE
        config = layers[layer]
        return ops.dequantize_weight(planes, scales, k, config.scheme, config.rotation, model_config.dtype)

    return with_weights(weights, layers, weight_of)


def order_of_rows(model: torch.nn.Module) -> Callable[[str, torch.Tensor], torch.Tensor] | None:
    """What puts the rows of a layer's tensor, by its name, in the order that the model's class gives a weight's as it
    loads: of Llama 4's queries and keys, whose rotary embedding is another one than in the checkpoint. None for classes
    that keep rows."""
    places = (named for named in model.named_modules() if hasattr(named[1], "permute_qk_weight_for_rotary"))
    place, language_model = next(places, ("", None))
    if language_model is None:
        return None

    def in_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer, _, kind = name.rpartition(".")
        if kind not in _OF_ROWS or (place and f"{place}." not in name):  # an encoder's
            return tensor
        rows = torch.arange(len(tensor), dtype=torch.float64).unsqueeze(-1)
        _, order = language_model.permute_qk_weight_for_rotary(f"{layer}.weight", rows)
        return tensor if order is rows else tensor[order.flatten().long()]

    return in_order
