"""FlexQ in transformers: `from_pretrained` of quantized checkpoints and, with a `FlexQConfig`, of any others.

`import flexq` registers both, as soon as transformers' quantizers are imported. A checkpoint's config.json holds its
`FlexQConfig`; without one, the layers are quantized while the model loads, one after the other.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexq import ops
from flexq.checkpoint.keys import (
    compare,
    is_own_class,
    keep_quantized_whole,
    read_quantized_whole,
    shapes_of,
    split_with,
)
from flexq.checkpoint.layers import insert_layers, plan_of_settings, settings_of
from flexq.checkpoint.source import QUANT_METHOD, CheckpointError, opened
from flexq.checkpoint.verify import PLAN_HASH, check_plan_hash
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.packed import PackedModule
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.quantize.dequantize import dequantize_model
from flexq.quantize.embeddings import quantize_embedding
from flexq.quantize.experts import PROJECTIONS, kind_of, module_of, round_experts, whole_of
from flexq.quantize.layers import (
    as_linear,
    forget_ties,
    identities,
    lm_head_name,
    record_plan,
    replace_module,
    weight_of,
)
from flexq.quantize.model import finish_quantized, on_quantized, resolve_plan
from flexq.run.fuse import unfuse_model


@register_quantization_config(QUANT_METHOD)
class FlexQConfig(QuantizationConfigMixin):
    """How a model's linear layers are quantized: for `from_pretrained`, and the `quantization_config` of a checkpoint.

    Args:
        plan: a `flexq.Plan`, a recipe's name ("w6a8", "w6a6", ...), a plan's JSON file or object.
        include: patterns as in `fnmatch`; if given, only layers that match one are quantized.
        skip: patterns of layers to leave in floating point.
        quant_method: "flexq"; in dictionaries that stand for this.
    """

    def __init__(
        self,
        plan: Plan | str | Path | dict[str, Any] = DEFAULT_RECIPE,
        include: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        quant_method: str = QUANT_METHOD,
    ):
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}")
        self.quant_method = QUANT_METHOD
        self.plan = Plan.of(plan)
        self.include = None if include is None else list(include)
        self.skip = list(skip)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs) -> "FlexQConfig":
        """Of a checkpoint's config.json, whose plan is an object that names every layer, or of arguments by name."""
        settings = dict(config_dict)
        if "format_version" in settings:
            settings["plan"] = plan_of_settings(settings)
            settings = {name: settings[name] for name in ("plan", "include", "skip") if name in settings}
        config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        settings = settings_of(self.plan)
        if self.include is not None:
            settings["include"] = self.include
        if self.skip:
            settings["skip"] = self.skip
        return settings

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _quantize_op(quantizer: "FlexQHfQuantizer"):
    from transformers.core_model_loading import ConversionOps

    class Quantize(ConversionOps):
        """What the loader does with the weight of a layer to be quantized: a `flexq.Linear` takes the layer's place,
        or `Experts` do once all of their tensors are there. Of a weight that it splits, it takes what is left."""

        @torch.no_grad()
        def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
            given = input_dict if len(input_dict) > 1 else {full_layer_name: next(iter(input_dict.values()))}
            left = {}
            for name, tensor in given.items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                if quantizer.is_of_experts(name):
                    quantizer.take_experts(model, name, tensor)
                elif quantizer.is_of_layer(name):
                    quantizer.quantize(model, name.removesuffix(".weight"), tensor)
                else:
                    left[name] = tensor
                    continue
                if missing_keys is not None:
                    missing_keys.difference_update(quantizer.filled_by(name))
            return left

    return Quantize()


@register_quantizer(QUANT_METHOD)
class FlexQHfQuantizer(HfQuantizer):
    """Of a quantized checkpoint, puts empty `flexq.Linear` layers into the skeleton for the loader to fill, and
    prepacks them. Of any other, replaces each layer as soon as its weight is there."""

    requires_calibration = False
    quantization_config: FlexQConfig
    conversions: Sequence[Any] = ()  # of transformers, by which the tensors of files become the model's

    def update_weight_conversions(self, weight_conversions, *model):  # with the model in later versions
        if self.pre_quantized:
            weight_conversions = read_quantized_whole(weight_conversions)
        self.conversions = weight_conversions
        return super().update_weight_conversions(weight_conversions, *model)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        if not self.pre_quantized:
            self.layers, self.embedding = resolve_plan(model, config.plan, config.include, config.skip)
            self.alike = _alike(model, self.layers)
            self.vanished = 0
            self.read: dict[str, dict[str, Any]] = {}  # of experts, what has been read so far
            return model
        insert_layers(model, config.plan)
        files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files:
            self._check(model, files)
        return model

    def _check(self, model, files: Sequence[str]) -> None:
        """Before anything is allocated: the files belong to this plan, and have what the model has."""
        hashes = set()
        for file in files:
            with opened(Path(file)) as handle:
                hashes.add((handle.metadata() or {}).get(PLAN_HASH))
        folder = Path(files[0]).parent
        check_plan_hash(self.quantization_config.plan, hashes, folder)
        compare(model, shapes_of(files)).require_none(str(folder))

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self.pre_quantized:
            return False
        # Of a weight that is split, transformers asks for the first part alone.
        names = (param_name, *split_with(self.conversions, param_name))
        return any(self.is_of_layer(name) or self.is_of_experts(name) for name in names)

    def is_of_layer(self, tensor: str) -> bool:
        """Whether a tensor is the weight of a linear layer to be quantized."""
        return tensor.endswith(".weight") and tensor.removesuffix(".weight") in self.layers

    def is_of_experts(self, tensor: str) -> bool:
        """Whether a tensor is the weight or bias of experts to be quantized."""
        layer = tensor.removesuffix("_bias")
        return layer.endswith(PROJECTIONS) and layer in self.layers

    def filled_by(self, tensor: str) -> list[str]:
        """The tensors that the model needs no more once it has this one."""
        return [f"{layer}.weight" for layer in self.alike.get(tensor.removesuffix(".weight"), ())] or [tensor]

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight, scales included; what the loader sets aside memory by."""
        return (6 + 16 / ops.GROUP_SIZE) / 8

    def get_quantize_ops(self):
        return _quantize_op(self)

    def quantize(self, model, name: str, weight: torch.Tensor) -> None:
        """Layer `name`, whose `weight` has been read, and those tied to it, from there on one `flexq.Linear`."""
        module, config = model.get_submodule(name), self.layers[name]
        if isinstance(module, Linear):
            return  # tied to one that was read before
        weight = weight_of(module, weight).contiguous()
        try:
            planes, scales = ops.quantize_weight(weight, config.scheme, config.rotation, config.weight_bits)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        self.vanished += ops.count_vanished(weight, scales)
        # Not prepacked yet: the loader makes non-persistent buffers anew.
        layer = Linear.from_canonical(planes, scales, as_linear(module), config, prepack=False)
        if layer.bias is not None and getattr(module.bias, "_is_hf_initialized", False):
            layer.bias._is_hf_initialized = True  # read already: it must not be initialized again
        for other in self.alike[name]:
            replace_module(model, other, layer)
        if len(self.alike[name]) > 1:
            forget_ties(model)

    def take_experts(self, model, name: str, tensor: torch.Tensor) -> None:
        """A weight or bias of experts, which take their place with the last of them."""
        whole, key = whole_of(name), name.rpartition(".")[2]
        module = model.get_submodule(whole)
        kind, read = kind_of(module), self.read.setdefault(whole, {})
        if key in PROJECTIONS:
            *canonical, vanished = round_experts(name, kind.oriented(tensor), self.layers[name])
            read[key] = (*canonical, tensor.dtype)
            self.vanished += vanished
        else:
            read[key] = tensor
        if len(read) < len(kind.tensors):
            return
        configs = [self.layers[f"{whole}.{p}"] for p in PROJECTIONS]
        (gate_up, down), dtype = (read[p][:2] for p in PROJECTIONS), read["down_proj"][2]
        biases = [read.get(f"{p}_bias") for p in PROJECTIONS]
        experts = kind.from_canonical(gate_up, down, biases, *configs, dtype, prepack=False)
        for parameter in experts.parameters():
            parameter._is_hf_initialized = True
        replace_module(model, whole, experts.train(module.training))
        del self.read[whole]

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _prepack(model)
            keep_quantized_whole(model)
            # Of the layers that are here: a base model has no head.
            model.flexq_plan = record_plan(model, self.quantization_config.plan)
            self.quantization_config.plan = model.flexq_plan
            return model
        head = lm_head_name(model)
        if head in self.layers:  # tied: it had no weight of its own in the checkpoint
            self.quantize(model, head, model.get_submodule(head).weight.detach())
        missing = [name for name in self.layers if not isinstance(module_of(model, name), (Linear, Experts))]
        if not is_own_class(model) and model.base_model is not model:
            # Of another head than the checkpoint's, which begins at random, as transformers says.
            missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(
                f"the checkpoint holds no weight for layer {missing[0]}{more}; leave a new head, which begins at "
                "random, out by skip"
            )
        if self.embedding is not None:  # the last: until here the LM head may be tied to it
            module = model.get_submodule(self.embedding)
            quantized, vanished = quantize_embedding(self.embedding, module)
            replace_module(model, self.embedding, quantized)
            self.vanished += vanished
        _prepack(model)
        return finish_quantized(
            model, self.quantization_config.plan, **({"vanished_scales": self.vanished} if self.vanished else {})
        )

    def get_state_dict_and_metadata(self, model):
        here = {name.replace(".base_layer", ""): c for name, c in record_plan(model, Plan()).layers.items() if c}
        if here != {name: c for name, c in model.flexq_plan.layers.items() if c}:
            raise ValueError(
                "layers of the model were exchanged since it was quantized or loaded, of which config.json knows "
                "nothing; save it by flexq.save_model"
            )
        metadata = {PLAN_HASH: model.flexq_plan.fingerprint()}
        first: dict[int, str] = {}
        again = [
            f"{name}."
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, Linear) and first.setdefault(id(module), name) != name
        ]
        if not again:
            return None, metadata
        # Planes are made for each name anew, so that transformers would not see that they are the same.
        return {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(tuple(again))}, metadata

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):  # as `save_pretrained` leaves a configuration's
            dtype = getattr(torch, dtype)
        dequantize_model(unfuse_model(model), dtype)
        for name in ("flexq_plan", "_weight_conversions"):
            vars(model).pop(name, None)
        return model

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside its layers

    @property
    def is_compileable(self) -> bool:
        return True


def _alike(model, layers: dict[str, LayerConfig]) -> dict[str, list[str]]:
    """Of each linear layer, all that have its weight and settings, itself among them."""
    linear = [name for name in layers if kind_of(module_of(model, name)) is None]
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, which in identities(model, linear).items():
        groups[which, layers[name]].append(name)
    return {name: names for names in groups.values() for name in names}


def _prepack(model) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            if module.scales.dtype == torch.float32:  # of those that transformers keeps so by their names
                module.scales = module.scales.half()
            try:
                module.prepack()
            except ValueError as error:
                raise CheckpointError(f"layer {name}: {error}") from None


def _attach(model, plan: Plan) -> None:
    """A transformers model that was quantized in memory knows it, as one that was loaded so does."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    config.quantization_config = FlexQConfig(plan)
    model.hf_quantizer = FlexQHfQuantizer(config.quantization_config)
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    keep_quantized_whole(model)


on_quantized.append(_attach)
