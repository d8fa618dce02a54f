"""Quantized checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(folder)` after `import flexq`."""

from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexq.linear import Linear
from flexq.patch import replace_module
from flexq.plan import LayerConfig, Plan

QUANT_METHOD = "flexq"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class FlexQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: format version and plan (docs/format.md).

    Args:
        plan: what was done to each layer, a `flexq.Plan` or its JSON object.
        format_version: of the tensors, 1.
    """

    def __init__(self, plan: Plan | dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **kwargs):
        self.quant_method = QUANT_METHOD
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has FlexQ format version {format_version}; this FlexQ reads {FORMAT_VERSION}"
            )
        self.format_version = format_version
        self.plan = Plan.of(plan if plan is not None else Plan())

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "plan": self.plan.to_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class FlexQHfQuantizer(HfQuantizer):
    """Puts empty `flexq.Linear` layers into the skeleton, which the loader then fills, and prepacks them."""

    quantization_config: FlexQConfig

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained loads models that FlexQ has quantized; quantize one with "
                "flexq.quantize_model(model) or `flexq quantize`"
            )

    def _process_model_before_weight_loading(self, model, **kwargs):
        insert_layers(model, self.quantization_config.plan)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Linear):
                module.prepack()
        model.flexq_plan = self.quantization_config.plan
        return model

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def insert_layers(model, plan: Plan) -> dict[str, LayerConfig]:
    """Replace the layers that a checkpoint's plan names by empty `flexq.Linear` on the meta device.

    Raises:
        ValueError: the plan names a layer that the model does not have.
    """
    inserted = {}
    for name, config in plan.layers.items():
        if config is None:
            continue
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the checkpoint's plan names layer {name!r}, which the model does not have") from None
        if not hasattr(linear, "in_features"):
            raise ValueError(f"the checkpoint's plan names layer {name!r}, which is a {type(linear).__name__}")
        bias = linear.bias is not None
        dtype = linear.weight.dtype
        layer = Linear(linear.in_features, linear.out_features, bias, config, device="meta", dtype=dtype)
        replace_module(model, name, layer)
        inserted[name] = config
    return inserted
