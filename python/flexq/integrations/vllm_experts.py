"""Mixture-of-experts layers in vLLM, each device with its part of each expert or with some of the experts.

Experts of a floating point checkpoint are quantized once vLLM has read it; a FlexQ checkpoint's projections, all
experts in one tensor, are loaded and sliced here.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from flexq import ops
from flexq.experts import Experts
from flexq.integrations.vllm_loading import Weights, have_loader_pass
from flexq.integrations.vllm_weights import fills_parameters_itself, loads_dummies
from flexq.plan import LayerConfig
from flexq.run.parallel import check_input_split

# vLLM's names of activations -> what flexq.ops.ExpertsDesc calls them.
_ACTIVATIONS = {
    "silu": {"function": "silu"},
    "gelu": {"function": "gelu"},
    "gelu_tanh": {"function": "gelu_tanh"},
    "swigluoai": {"function": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "interleaved": True},
    "swigluoai_uninterleave": {"function": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0},
}
# Attributes of vLLM's layers, where they are not None -> fields of flexq.ops.ExpertsDesc.
_SETTINGS = {"swiglu_alpha": "alpha", "swiglu_limit": "limit", "swiglu_beta": "up_offset"}
# What is below the experts in names -> projection. Some of vLLM's mappers rename it.
_PROJECTIONS = {
    "gate_up_proj": "gate_up", "w13": "gate_up", "w13_weight": "gate_up",
    "down_proj": "down", "w2": "down", "w2_weight": "down",
}  # fmt: skip

_LOADED_ONCE = "quantized experts are loaded once: start the server anew instead of reloading weights"


def activation_of(layer: torch.nn.Module) -> dict[str, object] | None:
    """How `Experts` computes the activation of one of vLLM's layers; None for one that it does not know."""
    activation = getattr(layer, "activation", "silu")
    known = _ACTIVATIONS.get(str(getattr(activation, "value", activation)))
    if known is None:
        return None
    given = {field: getattr(layer, name, None) for name, field in _SETTINGS.items()}
    return known | {field: value for field, value in given.items() if value is not None}


def _as_experts(prefix: str) -> str:
    """A regular expression of the names that a plan may have for the experts `prefix`. vLLM may call the module around
    them otherwise than transformers (block_sparse_moe, mlp), or have one more."""
    stem = re.escape(prefix.removesuffix(".experts").rpartition(".")[0])
    return rf"{stem}\.(?:[^.*?[]+\.)?experts"


def names_of_experts(layers: dict[str, LayerConfig | None], prefix: str) -> tuple[str, str] | None:
    """A checkpoint's layers that are gate_up and down of the experts `prefix`; None if those are in floating point."""
    found: dict[str, list[str]] = {"gate_up": [], "down": []}
    for name, config in layers.items():
        match = re.fullmatch(rf"{_as_experts(prefix)}\.({'|'.join(_PROJECTIONS)})", name)
        if match and config is not None:
            found[_PROJECTIONS[match[1]]].append(name)
    if not all(found.values()):
        return None
    for projection, names in found.items():
        meant = [name for name in names if name.startswith(f"{prefix}.")] or names
        if len(meant) > 1:
            raise ValueError(f"{prefix}: the plan has both {' and '.join(meant)}, and either may be meant")
        found[projection] = meant
    return found["gate_up"][0], found["down"][0]


def name_in(layers: dict[str, LayerConfig | None], prefix: str) -> str:
    """What a plan calls the experts `prefix`, by a name that is no pattern."""
    names = (re.fullmatch(rf"({_as_experts(prefix)})(\.({'|'.join(_PROJECTIONS)}))?", name) for name in layers)
    return next((match[1] for match in names if match), prefix)


def _without_experts(weights: Weights, _, model: torch.nn.Module) -> Weights:
    """A checkpoint's tensors without those that quantized experts take: classes of models look for tensors of single
    experts, or know experts by names of their own. With other loaders experts go by `layer.load_weights`."""
    if any(hasattr(module, "flexq_experts") for module in model.modules()):
        raise RuntimeError(_LOADED_ONCE)
    return _others(weights, model)


def _others(weights: Weights, model: torch.nn.Module) -> Weights:
    taken = {m.flexq_checkpoint_name: m for m in model.modules() if hasattr(m, "flexq_checkpoint_name")}
    for name, tensor in weights:
        stem, separator, rest = name.rpartition(".experts.")
        layer = taken.get(stem + separator[:-1])
        if layer is None:
            yield name, tensor
        else:
            list(layer.load_weights([(rest, tensor)]))


class _ExpertsMethod(FusedMoEMethodBase):
    """Experts with quantized weights, however they come about."""

    def __init__(self, moe, prefix: str):
        super().__init__(moe)
        self.prefix = prefix
        have_loader_pass(_without_experts)

    def _finish(self, layer: torch.nn.Module, make, *args, **settings) -> None:
        """Puts `make`'s experts where vLLM's parameters were."""
        if hasattr(layer, "flexq_experts"):
            raise RuntimeError(_LOADED_ONCE)
        settings |= activation_of(layer)
        settings["weights_on_input"] = bool(getattr(layer, "apply_router_weight_on_input", False))
        try:
            layer.flexq_experts = make(*args, **settings)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        for name in [name for name in layer._parameters if name.startswith(("w13_", "w2_"))]:
            delattr(layer, name)
        for projection in (layer.flexq_experts.gate_up_proj, layer.flexq_experts.down_proj):
            if projection.bias is not None:  # like the weights a buffer, which vLLM's sleep of level 2 keeps
                bias = projection.bias.data
                del projection.bias
                projection.register_buffer("bias", bias)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module):
        return None  # of vLLM's own kernels

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_, **__
    ) -> torch.Tensor:
        return layer.flexq_experts.multiply(x, topk_ids, topk_weights, getattr(layer, "expert_map", None))


class QuantizingExpertsMethod(_ExpertsMethod):
    """Experts made of what vLLM loads in floating point."""

    def __init__(self, moe, prefix: str, gate_up: LayerConfig, down: LayerConfig, check: Callable[[], None]):
        super().__init__(moe, prefix)
        self.configs, self.check = (gate_up, down), check

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
        # Not while they are read, as linears are: some classes (gpt-oss) copy into them without their loaders.
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.zeros(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check()
        biases = [getattr(layer, name).data if hasattr(layer, name) else None for name in ("w13_bias", "w2_bias")]
        if biases[1] is not None and self.moe.tp_rank > 0:
            biases[1].zero_()  # the outputs of the ranks are added
        self._finish(
            layer,
            Experts.from_float,
            layer.w13_weight.data,
            layer.w2_weight.data,
            *biases,
            gate_up_config=self.configs[0],
            down_config=self.configs[1],
        )


class CheckpointExpertsMethod(_ExpertsMethod):
    """Experts of a FlexQ checkpoint: `gate_up_proj.qweight`, `down_proj.scales` and so on, of all experts.

    Args:
        of_checkpoint: the experts' name in it.
        check: called once all of the model's layers exist.
    """

    def __init__(
        self, moe, prefix: str, gate_up: LayerConfig, down: LayerConfig, of_checkpoint: str, check: Callable[[], None]
    ):
        super().__init__(moe, prefix)
        self.configs = {"gate_up": gate_up, "down": down}
        self.of_checkpoint, self.check = of_checkpoint, check
        self.is_checked = not fills_parameters_itself()

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_,
    ) -> None:
        here, splits = intermediate_size_per_partition, self.moe.tp_size
        if splits > 1:
            check_input_split(f"{self.prefix}.down_proj", here * splits, splits)
        sizes = {"gate_up": (2 * here, hidden_size), "down": (hidden_size, here)}
        for projection, (rows, columns) in sizes.items():
            groups = ops.num_groups(columns)
            config = self.configs[projection]
            per_row = groups if config.scheme == "group" else 1
            tensors = {
                "qweight": torch.zeros(num_experts, rows, groups, config.weight_bits, 16, dtype=torch.uint8),
                "scales": torch.zeros(num_experts, rows, per_row, dtype=torch.float16),
            }
            if getattr(self.moe, "has_bias", False):
                tensors["bias"] = torch.zeros(num_experts, rows, dtype=params_dtype)
            for name, tensor in tensors.items():
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(_parameter(projection, name), parameter)
        layer.flexq_missing = {name for name in layer._parameters if name.startswith(("w13_", "w2_"))}
        # vLLM's own looks for tensors of single experts, and for weights in floating point.
        layer.load_weights = partial(self._load, layer)
        layer.flexq_checkpoint_name = self.of_checkpoint

    def _load(self, layer: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, loaded in weights:
            projection, _, tensor = name.partition(".")
            parameter = _parameter(_PROJECTIONS.get(projection, projection), tensor)
            if parameter not in layer._parameters:
                raise ValueError(f"{self.prefix}.{name}: quantized experts have no such tensor")
            self._load_part(layer, f"{self.prefix}.{name}", parameter, tensor, loaded)
            layer.flexq_missing.discard(parameter)
            yield parameter

    def _load_part(self, layer: torch.nn.Module, name: str, parameter: str, tensor: str, loaded: torch.Tensor) -> None:
        """This device's experts, or its part of each."""
        mine = getattr(layer, parameter).data
        rank, splits = self.moe.tp_rank, self.moe.tp_size
        whole = [layer.global_num_experts, *mine.shape[1:]]
        split = 1
        if parameter.startswith("w2_"):
            is_by_group = tensor == "qweight" or (tensor == "scales" and self.configs["down"].scheme == "group")
            split = 2 if is_by_group else None
        if split is not None:
            whole[split] *= splits
        if (loaded.dtype != mine.dtype and tensor != "bias") or list(loaded.shape) != whole:
            raise ValueError(
                f"{name} must be {mine.dtype} {whole}, got {loaded.dtype} {list(loaded.shape)}: the checkpoint does "
                "not fit the model or its plan"
            )
        experts = getattr(layer, "expert_map", None)
        if experts is not None:
            here = torch.nonzero(experts >= 0).flatten()
            loaded = loaded[here[experts[here].argsort()].cpu()]
        if split == 1 and not activation_of(layer).get("interleaved", False):
            loaded = torch.cat([half.chunk(splits, 1)[rank] for half in loaded.chunk(2, 1)], 1)
        elif split is not None:
            loaded = loaded.chunk(splits, split)[rank]
        elif tensor == "bias" and rank > 0:
            loaded = torch.zeros_like(loaded)  # the outputs of the ranks are added
        mine.copy_(loaded)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check()
        if loads_dummies():
            for projection in self.configs:
                getattr(layer, _parameter(projection, "scales")).data.abs_()
        if layer.flexq_missing and self.is_checked:
            raise ValueError(
                f"{self.prefix}: {', '.join(sorted(layer.flexq_missing))} did not come: the checkpoint has no such "
                "tensors, or its loader gives them to vLLM's class of this model, which does not know them; serve the "
                "floating point model with --quantization flexq"
            )
        canonical = [
            tuple(getattr(layer, _parameter(projection, tensor)).data for tensor in ("qweight", "scales"))
            for projection in ("gate_up", "down")
        ]
        biases = [getattr(layer, _parameter(projection, "bias"), None) for projection in ("gate_up", "down")]
        self._finish(
            layer,
            Experts.from_canonical,
            *canonical,
            layer.moe_config.intermediate_size_per_partition,
            *biases,
            gate_up_config=self.configs["gate_up"],
            down_config=self.configs["down"],
        )
        del layer.load_weights, layer.flexq_checkpoint_name


def _parameter(projection: str, tensor: str) -> str:
    """A name like those of vLLM's own parameters of experts."""
    return ("w2_" if projection == "down" else "w13_" if projection == "gate_up" else f"{projection}_") + tensor
