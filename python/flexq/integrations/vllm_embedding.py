"""A FlexQ checkpoint's quantized token embedding in vLLM: each device with its rows.

Classes of models that ask no quantization method for their embedding get it dequantized, as it is loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from flexq import ops
from flexq.embedding import CONFIG, canonical_of, dequantized_rows, look_up, rows_of
from flexq.integrations.vllm_loading import Weights, config_of, with_weights
from flexq.integrations.vllm_weights import fills_parameters_itself, keep_packed, loads_dummies, method_of

_TENSORS = ("qweight", "scales")
logger = init_logger(f"vllm.plugins.{__name__}")


class EmbeddingMethod(QuantizeMethodBase):
    """Lookups in a quantized embedding.

    Args:
        name: of the embedding in the checkpoint.
    """

    def __init__(self, name: str):
        self.name, self.is_checked = name, not fills_parameters_itself()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        layer.flexq_dtype, layer.flexq_loaded, layer.flexq_k = params_dtype, set(), k
        shapes = {"qweight": (n, ops.num_groups(k), CONFIG.weight_bits, 16), "scales": (n, 1)}
        dtypes = {"qweight": torch.uint8, "scales": torch.float16}
        for tensor in _TENSORS:
            zeros = torch.zeros(shapes[tensor], dtype=dtypes[tensor])
            parameter = torch.nn.Parameter(zeros, requires_grad=False)
            layer.register_parameter(tensor, parameter)
            loader = self._checked(layer, tensor, extra_weight_attrs["weight_loader"])
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": loader})

    def _checked(self, layer: torch.nn.Module, tensor: str, loader: Callable) -> Callable:
        """vLLM's loader, which would cast what does not fit."""

        def load(layer, loader, param, loaded):
            whole = [layer.org_vocab_size, *param.shape[1:]]
            if loaded.dtype != param.dtype or list(loaded.shape) != whole:
                raise ValueError(
                    f"{self.name}.{tensor} must be {param.dtype} {whole}, got {loaded.dtype} {list(loaded.shape)}: "
                    "the checkpoint does not fit the model or its plan"
                )
            loader(param, loaded)
            layer.flexq_loaded.add(tensor)

        return method_of(layer, load, loader)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        missing = [tensor for tensor in _TENSORS if tensor not in layer.flexq_loaded]
        if missing and self.is_checked:
            raise ValueError(f"the checkpoint has no {self.name}.{missing[0]}")
        layer.flexq_loaded.clear()
        if loads_dummies():
            layer.scales.data.abs_()
        planes, scales = layer.qweight.data, layer.scales.data
        ops.check_scales(scales)
        rows = rows_of(planes, scales, layer.flexq_k)
        for tensor in _TENSORS:
            delattr(layer, tensor)
        keep_packed(layer, {"weight_packed": rows}, _add_canonical)
        add_stand_in(layer, rows.device)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError(f"{self.name} is quantized for lookups; an LM head has a weight of its own")

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        return look_up(layer.weight_packed, input_, layer.flexq_dtype)


def add_stand_in(layer: torch.nn.Module, device: torch.device) -> None:
    """A `weight` for an embedding or an LM head: LoRA asks it for dtype and device, speculation for its width and
    whether it is equal to another."""
    nothing = torch.full((1, layer.flexq_k), float("nan"), dtype=layer.flexq_dtype, device=device)
    layer._parameters.pop("weight", None)  # of what it is tied to
    layer.register_buffer("weight", nothing, persistent=False)


def _add_canonical(layer: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _) -> None:
    """What the embedding was loaded from: what vLLM writes into a sharded state."""
    for tensor, value in zip(_TENSORS, canonical_of(layer.weight_packed), strict=True):
        state[prefix + tensor] = value.cpu()


# ---- Where there is no place for it ----------------------------------------------------------------------------------


def with_embeddings_dequantized(weights: Weights, model_config, model: torch.nn.Module) -> Weights:
    """A checkpoint's tensors, with the weight of an embedding that has no place as it is."""

    def weight_of(name: str, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        logger.info_once(f"vLLM's class of this model takes no quantized embedding: {name} is dequantized")
        return dequantized_rows(rows_of(planes, scales, _length_of_rows(model, model_config)), model_config.dtype)

    return with_weights(weights, _without_place(model), weight_of)


def _without_place(model: torch.nn.Module) -> set[str]:
    """Names in the checkpoint of the quantized embeddings that the model has no method for."""
    config = config_of(model)
    return set() if config is None else config.embeddings_without_place()


def _length_of_rows(model: torch.nn.Module, model_config) -> int:
    """Of the token embedding, where it is on this device."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and module.org_vocab_size == model_config.get_vocab_size():
            return module.embedding_dim
    return model_config.get_hidden_size()
