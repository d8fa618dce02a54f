"""What FlexQ's layers in vLLM share: how their weights are loaded, held, and loaded again.

vLLM records each layer's parameters before they are loaded, on the meta device and with their loaders, so that
`reload_weights` can make the layer anew, and then copies what came out of it into the parameters that were in use
(vllm/model_executor/model_loader/reload). So packed weights are parameters, not buffers, which it would leave as they
were; and loaders are methods of their layers, of which vLLM's records let go, and hold no tensors.
"""

from collections.abc import Callable
from types import MethodType

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing

_PROCESSED = "_already_called_process_weights_after_loading"


def method_of(layer: torch.nn.Module, load: Callable, loader: Callable) -> MethodType:
    """A method of the layer, load(layer, loader, param, loaded, ...), where `loader` is one of vLLM's for it."""
    is_method = isinstance(loader, MethodType) and loader.__self__ is layer
    function = loader.__func__ if is_method else loader

    def method(layer: torch.nn.Module, param: torch.nn.Parameter, loaded: torch.Tensor, *args, **kwargs) -> None:
        load(layer, function.__get__(layer) if is_method else function, param, loaded, *args, **kwargs)

    return MethodType(method, layer)


def quantize_while_loading(method, layer: torch.nn.Module) -> None:
    """Has vLLM give memory to the layer's parameters, which are on the meta device, once their tensors have been read,
    and process them at once: the model in floating point is never whole in memory."""
    method.uses_meta_device = True  # as vLLM asks methods
    initialize_online_processing(layer)


def require_read(layer: torch.nn.Module, name: str) -> None:
    """That a layer that is quantized while it is read was read: what is copied into a parameter on the meta device,
    past its loader, is lost.

    Raises:
        ValueError: nothing came by the loader.
    """
    if not loads_dummies() and not any(tensor == "weight" for tensor, _ in get_layerwise_info(layer).loaded_weights):
        raise ValueError(
            f"{name}: no weight was read into it; the checkpoint has none, or vLLM's class of this model reads it in a "
            "way that --quantization flexq does not know: serve what `flexq quantize` writes"
        )


def is_processed(layer: torch.nn.Module) -> bool:
    """Whether that has happened: vLLM processes every layer again at the end. It takes the mark away to reload."""
    return getattr(layer, _PROCESSED, False)


def mark_processed(layer: torch.nn.Module) -> None:
    setattr(layer, _PROCESSED, True)


def keep_packed(
    layer: torch.nn.Module, packed: dict[str, torch.Tensor], add_canonical: Callable[..., None] | None = None
) -> None:
    """Makes packed weights parameters of the layer, which no state has: they are one device's.

    Args:
        add_canonical: a state-dict hook of PyTorch that adds what the layer was loaded from.
    """
    for name, weight in packed.items():
        layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    if not hasattr(layer, "flexq_packed"):  # the first time, not when it is reloaded
        layer.register_state_dict_post_hook(_leave_out_packed)
        if add_canonical is not None:
            layer.register_state_dict_post_hook(add_canonical)
    layer.flexq_packed = tuple(packed)


def _leave_out_packed(layer: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _) -> None:
    for name in layer.flexq_packed:
        state.pop(prefix + name, None)


def fills_parameters_itself() -> bool:
    """Whether vLLM fills parameters without their loaders: sharded states, of which it itself sees that none is
    missing, and dummies."""
    return loads_sharded_state() or loads_dummies()


def loads_sharded_state() -> bool:
    return "sharded" in _load_format()


def is_pooling() -> bool:
    """Whether the model that is being loaded gives embeddings or classes, so that vLLM leaves out its LM head."""
    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is not None and getattr(vllm_config.model_config, "runner_type", None) == "pooling"


def loads_dummies() -> bool:
    """Whether weights are made up. Their scales may be negative."""
    return _load_format() == "dummy"


def _load_format() -> str:
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return ""
    load_format = vllm_config.load_config.load_format
    return str(getattr(load_format, "value", load_format))
