"""Mixture-of-experts layers in vLLM: experts of a floating point checkpoint, quantized once they are loaded.

Tensor parallel ranks quantize their part of each expert, expert parallel ones the experts that they have.
"""

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from flexq.experts import Experts
from flexq.plan import LayerConfig

# vLLM's names of activations -> what flexq.ops.ExpertsDesc calls them.
_ACTIVATIONS = {
    "silu": {"function": "silu"},
    "gelu": {"function": "gelu"},
    "gelu_tanh": {"function": "gelu_tanh"},
    "swigluoai": {"function": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True},
    "swigluoai_uninterleave": {"function": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0},
}


def activation_of(layer: torch.nn.Module) -> dict[str, object] | None:
    """How `Experts` computes the activation of one of vLLM's layers; None for one that it does not know."""
    activation = getattr(layer, "activation", "silu")
    return _ACTIVATIONS.get(str(getattr(activation, "value", activation)))


class FlexQMoEMethod(FusedMoEMethodBase):
    """Experts with 6-bit weights, made of what vLLM loads in floating point."""

    def __init__(self, moe, prefix: str, config: LayerConfig):
        super().__init__(moe)
        self.prefix, self.config = prefix, config

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        rows = 2 * intermediate_size_per_partition
        shapes = {
            "w13_weight": (num_experts, rows, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        if getattr(self.moe, "has_bias", False):
            shapes |= {"w13_bias": (num_experts, rows), "w2_bias": (num_experts, hidden_size)}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.zeros(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        biases = [getattr(layer, name).data if hasattr(layer, name) else None for name in ("w13_bias", "w2_bias")]
        try:
            layer.flexq_experts = Experts.from_float(
                layer.w13_weight.data,
                layer.w2_weight.data,
                *biases,
                gate_up_config=self.config,
                weights_on_input=bool(getattr(layer, "apply_router_weight_on_input", False)),
                **activation_of(layer),
            )
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            if name in layer._parameters:
                delattr(layer, name)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module):
        return None  # of vLLM's own kernels

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_, **__
    ) -> torch.Tensor:
        return layer.flexq_experts.multiply(x, topk_ids, topk_weights, getattr(layer, "expert_map", None))
