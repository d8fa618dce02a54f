"""FlexQ in transformers: `from_pretrained` of quantized checkpoints and, with a `FlexQConfig`, of any others.

`import flexq` registers both. A checkpoint's config.json holds its `FlexQConfig`; without one, the layers are quantized
while the model loads, one after the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexq import ops
from flexq.linear import Linear
from flexq.patch import lm_head_name, output_embeddings, record_plan, replace_module, resolve_plan, untie_lm_head
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan

QUANT_METHOD = "flexq"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class FlexQConfig(QuantizationConfigMixin):
    """How a model's linear layers are quantized: for `from_pretrained`, and the `quantization_config` of a checkpoint.

    Args:
        plan: a `flexq.Plan`, a recipe's name ("w6a8", "w6a6", ...), a plan's JSON file or object.
        include: patterns as in `fnmatch`; if given, only layers that match one are quantized.
        skip: patterns of layers to leave in floating point.
        format_version: of a checkpoint's tensors, 1.
    """

    def __init__(
        self,
        plan: Plan | str | Path | dict[str, Any] = DEFAULT_RECIPE,
        include: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        format_version: int = FORMAT_VERSION,
        **kwargs,
    ):
        self.quant_method = QUANT_METHOD
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has FlexQ format version {format_version}; this FlexQ reads {FORMAT_VERSION}"
            )
        self.format_version = format_version
        self.plan = Plan.of(plan)
        self.include = None if include is None else list(include)
        self.skip = list(skip)

    def to_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "plan": self.plan.to_dict(),
        }
        if self.include is not None:
            settings["include"] = self.include
        if self.skip:
            settings["skip"] = self.skip
        return settings

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _loading(layer: Linear) -> Linear:
    """The layer with an empty `weight` until the model is loaded: some classes initialize their children's weights
    without a look at what the children are."""
    weight = torch.empty(0, device="meta")
    weight._is_hf_initialized = True
    layer.__dict__["weight"] = weight
    return layer


class _Quantize(ConversionOps):
    """What the loader does with the weight of a layer to be quantized: a `flexq.Linear` takes the layer's place."""

    def __init__(self, quantizer: "FlexQHfQuantizer"):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        linear, config = model.get_submodule(name), self.quantizer.layers[name]
        try:
            planes, scales = ops.quantize_weight(weight, config.scheme, config.rotation)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        replace_module(model, name, _loading(Linear.from_canonical(planes, scales, linear, config)))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


@register_quantizer(QUANT_METHOD)
class FlexQHfQuantizer(HfQuantizer):
    """Of a quantized checkpoint, puts empty `flexq.Linear` layers into the skeleton for the loader to fill, and
    prepacks them. Of any other, replaces each layer as soon as its weight is there."""

    requires_calibration = False
    quantization_config: FlexQConfig

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        if self.pre_quantized:
            insert_layers(model, config.plan)
        else:
            self.layers = resolve_plan(model, config.plan, config.include, config.skip)
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and param_name.removesuffix(".weight") in self.layers

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight, scales included; what the loader sets aside memory by."""
        return (6 + 16 / ops.GROUP_SIZE) / 8

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Linear):
                module.__dict__.pop("weight", None)
                module.prepack()
        if not self.pre_quantized:
            head = lm_head_name(model)
            if head in self.layers:  # tied: it had no weight of its own in the checkpoint
                replace_module(model, head, Linear.from_float(model.get_submodule(head), self.layers[head]))
            if isinstance(output_embeddings(model), Linear):
                untie_lm_head(model)
            missing = [name for name in self.layers if not isinstance(model.get_submodule(name), Linear)]
            if missing:
                raise ValueError(f"the checkpoint holds no weight for layer {missing[0]} (and {len(missing) - 1} more)")
            self.quantization_config = FlexQConfig(record_plan(model, self.quantization_config.plan))
            model.config.quantization_config = self.quantization_config
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
        replace_module(model, name, _loading(layer))
        inserted[name] = config
    return inserted
