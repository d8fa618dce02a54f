"""FlexQ in vLLM: a quantization method that `vllm serve` finds by itself, through its plugin entry point.

A FlexQ checkpoint needs no flag: its config.json says `quant_method: flexq`. Its canonical tensors are the layers'
parameters, so vLLM's own loaders slice them for tensor parallelism and for its merged q/k/v and gate/up layers; after
loading they become what the device's kernels read, and are freed. `--quantization flexq` quantizes a checkpoint in
floating point while it loads.

Environment:
    FLEXQ_PLAN: recipe or JSON file for `--quantization flexq` (default w6a8).
    FLEXQ_VERIFY: 0 to leave out the check of a checkpoint's checksums before it loads.
    FLEXQ_FUSE: 0 to leave norms and SiLU products apart from the quantization that follows them.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from flexq import ops
from flexq.checkpoint.layers import plan_of_settings
from flexq.checkpoint.source import CheckpointError, ModelError, find_model
from flexq.checkpoint.verify import verify_files
from flexq.embedding import CONFIG as EMBEDDING
from flexq.integrations.vllm_embedding import EmbeddingMethod, add_stand_in, have_vllm_dequantize
from flexq.integrations.vllm_weights import (
    fills_parameters_itself,
    is_processed,
    keep_packed,
    loads_dummies,
    loads_sharded_state,
    mark_processed,
    method_of,
    quantize_while_loading,
    require_read,
)
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.quantize.layers import some
from flexq.run.parallel import check_input_split

QUANT_METHOD = "flexq"
# Layers that choose experts stay in floating point.
_ROUTERS = ("gate", "router")
# So do the parts beside a language model: names that are or contain one of these.
_ENCODERS = re.compile(
    r"(^|\.)([^.]*(vision|visual|image|audio|speech|multi_modal|multimodal)[^.]*|vpm|apm|resampler|connector)(\.|$)"
)
logger = init_logger(f"vllm.plugins.{__name__}")  # vLLM shows what its own loggers say

try:
    from flexq.integrations.vllm_fusion import add_fusion_pass
except ImportError as missing:
    _WHY_UNFUSED = str(missing)

    def add_fusion_pass() -> None:
        logger.info_once(f"FlexQ leaves quantization unfused in this version of vLLM: {_WHY_UNFUSED}")


class FlexQVllmConfig(QuantizationConfig):
    """Which of a model's layers are quantized, and how.

    Args:
        plan: a checkpoint's, with every layer by name, or None to quantize layers as they are loaded.
    """

    def __init__(self, plan: Plan | None = None):
        super().__init__()
        self.is_checkpoint = plan is not None
        self.plan = Plan.of(os.environ.get("FLEXQ_PLAN", DEFAULT_RECIPE)) if plan is None else plan
        self._of_checkpoint: dict[str, str] = {}  # its names of the plan's layers, where vLLM's are others
        # Of the plan's layers those that the model has; on the way, all of the model's.
        self._placed: set[str] = set()
        self._experts: dict[str, str] = {}  # projections of experts -> the experts
        self._are_all_placed = False
        if self.plan.embeddings is not None and not self.is_checkpoint:
            raise ValueError(
                "embeddings are not quantized while vLLM loads a checkpoint in floating point: leave them out of the "
                "plan, or serve what `flexq quantize --embeddings` writes"
            )

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FlexQVllmConfig":
        return cls(plan_of_settings(config))

    def maybe_update_config(self, model_name: str, hf_config=None, revision=None) -> None:
        """Refuses a damaged checkpoint before anything is loaded."""
        if not self.is_checkpoint or os.environ.get("FLEXQ_VERIFY", "1") == "0":
            return
        try:
            folder = find_model(model_name).folder  # a hub id's too, once it is in the cache
        except CheckpointError:
            raise
        except ModelError:
            return  # where vLLM finds models that we do not
        if folder is not None and not any(folder.glob("model-rank-*")):  # vLLM's sharded states have no checksums
            verify_files(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Names of the checkpoint's layers to vLLM's, where a model renames them."""
        renamed = {name: _renamed(hf_to_vllm_mapper, name) for name in self.plan.layers}
        layers = {renamed[name]: config for name, config in self.plan.layers.items()}
        self.plan = replace(self.plan, layers=layers)
        self._of_checkpoint = {new: self._of_checkpoint.get(name, name) for name, new in renamed.items()}

    def check_all_placed(self) -> None:
        """Refuses a checkpoint with quantized layers that a block of the model has under no name, whose weights vLLM's
        classes may leave out without a word. Blocks that are not here at all are other devices'. Every layer asks
        once all exist; the first answer is that of all. On the way, refuses a plan that names what the model has not.
        """
        if self._are_all_placed:
            return
        if not self.is_checkpoint:
            if _has_all_blocks():
                self._require_known()
            self._are_all_placed = True
            return
        here = {_block_of(name) for name in self._placed} - {None}
        missing = [
            name
            for name, config in self.plan.layers.items()
            if config is not None and name not in self._placed and _block_of(name) in here
        ]
        if missing:
            raise ValueError(
                f"the checkpoint has quantized {some(missing)}, which vLLM's class of this model has not: serve the "
                "floating point model with --quantization flexq"
            )
        self._are_all_placed = True

    def _require_known(self) -> None:
        """Refuses settings for what the model has not. What a plan leaves as it is may be missing."""
        names, unknown = self._placed | self._experts.keys(), []
        settings = {name: config for name, config in self.plan.layers.items() if config is not None}
        replace(self.plan, layers=settings).resolve(names, self._experts)
        for name in self.plan.layers.keys() - settings.keys():
            try:
                Plan(layers={name: None}).resolve(names, self._experts)
            except ValueError:
                unknown.append(name)
        unknown = sorted(name for name in unknown if not _stays_anyway(name))
        if unknown:
            logger.warning_once(f"FlexQ's plan leaves {some(unknown)} as it is, and vLLM asks for no such layer")

    @functools.cached_property
    def _hash_of_plan(self) -> str:
        plan = self.plan.to_dict() | {"produced_by": {}}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def _is_named(self, prefix: str) -> bool:
        """Whether the plan has settings for a layer, or a part of it, by its very name."""
        return any(self.plan.layers.get(name) is not None for name in self._parts(prefix))

    def _parts(self, prefix: str) -> list[str]:
        """Names of the layers that are one in vLLM."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _layer_configs(self, prefix: str) -> list[LayerConfig | None]:
        """Settings of the layers that are one in vLLM."""
        names = self._parts(prefix)
        if self.is_checkpoint and len(names) > 1 and not any(n in self.plan.layers for n in names):
            names = [prefix]  # merged in the checkpoint too
        self._placed.update(names)
        if self.is_checkpoint:
            return [self.plan.layers.get(n) for n in names]
        return [self.plan.config_for(n) for n in names]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        add_fusion_pass()
        _have_vllm_tell_plans_apart(self._hash_of_plan)
        if self.plan.embeddings is not None:
            have_vllm_dequantize()
        if isinstance(layer, ParallelLMHead):
            config = self.plan.layers.get(prefix)
            self._placed.add(prefix)
            return None if config is None else FlexQLinearMethod(self, prefix, [config])
        if isinstance(layer, VocabParallelEmbedding):
            return self._method_of_embedding(layer, prefix)
        if not isinstance(layer, LinearBase):
            return self._method_of_experts(layer, prefix) if _holds_experts(layer) else None
        if not self.is_checkpoint and _stays_anyway(prefix) and not self._is_named(prefix):
            return UnquantizedLinearMethod()
        configs = self._layer_configs(prefix)
        if all(config is None for config in configs):
            return UnquantizedLinearMethod()
        if any(config is None for config in configs) or len({(c.scheme, c.weight_bits) for c in configs}) > 1:
            parts = self.packed_modules_mapping.get(prefix.rpartition(".")[2], [])
            raise ValueError(
                f"{prefix}: vLLM merges {', '.join(parts)}; a plan may give them different act_bits and rotations, but "
                "one scheme and weight_bits, and none of them may be left unquantized while others are not; it gives "
                + ", ".join("none" if c is None else f"{c.scheme} {c.weight_bits} bits" for c in configs)
            )
        return FlexQLinearMethod(self, prefix, configs)

    def _method_of_embedding(self, layer: VocabParallelEmbedding, prefix: str) -> EmbeddingMethod | None:
        """Of the token embedding, which some of vLLM's classes give no name."""
        names = self._embeddings()
        if prefix:
            names &= {prefix}
        elif layer.org_vocab_size != _vocabulary():
            return None
        if len(names) != 1:
            return None
        self._placed |= names
        return EmbeddingMethod(*names)

    def _embeddings(self) -> set[str]:
        """The plan's names that may be the embedding's and are no other layer's."""
        if self.plan.embeddings is None:
            return set()
        settings = self.plan.layers.items()
        found = {name for name, config in settings if config == EMBEDDING and _block_of(name) is None}
        return found - self._placed

    def embeddings_without_place(self) -> set[str]:
        """Names in the checkpoint of embeddings that vLLM's class asks no method for; once all layers exist."""
        return {self._of_checkpoint.get(name, name) for name in self._embeddings()}

    def _method_of_experts(self, layer: torch.nn.Module, prefix: str):
        """Of a floating point checkpoint they are quantized on the way, of a FlexQ checkpoint as it has them."""
        from flexq.integrations import vllm_experts

        is_known = vllm_experts.activation_of(layer) is not None
        if self.is_checkpoint:
            names = vllm_experts.names_of_experts(self.plan.layers, prefix)
            if names is None:
                return None
            if not is_known:
                raise ValueError(f"{prefix}: its experts are quantized, and FlexQ has no activation {layer.activation}")
            self._placed.update(names)
            return vllm_experts.CheckpointExpertsMethod(
                layer.moe_config,
                prefix,
                *(self.plan.layers[name] for name in names),
                of_checkpoint=self._of_checkpoint.get(names[0], names[0]).rpartition(".")[0],
                check=self.check_all_placed,
            )
        whole = vllm_experts.name_in(self.plan.layers, prefix)
        names = [f"{whole}.{projection}" for projection in ("gate_up_proj", "down_proj")]
        self._experts |= dict.fromkeys(names, whole)
        configs = [self.plan.config_for(name, whole) for name in names]
        if all(config is None for config in configs):
            return None
        if None in configs:
            raise ValueError(f"{prefix}: the plan leaves one of {' and '.join(names)} as it is; vLLM has both or none")
        if not is_known:
            logger.info_once(f"FlexQ leaves experts in floating point: it has no activation {layer.activation}")
            return None
        return vllm_experts.QuantizingExpertsMethod(layer.moe_config, prefix, *configs, check=self.check_all_placed)


def _renamed(mapper, name: str) -> str:
    """vLLM's name of a layer: of itself, or, as mappers of LM heads have it, of what is in it."""
    for suffix in ("", ".weight"):
        new = (mapper.apply_list([name + suffix]) or [name + suffix])[0]
        if new != name + suffix:
            return new.removesuffix(suffix)
    return name


def _has_all_blocks() -> bool:
    """Whether this process has all of the model's layers, not a pipeline's part of them."""
    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is None or vllm_config.parallel_config.pipeline_parallel_size == 1


def _stays_anyway(name: str) -> bool:
    """Whether a layer is left in floating point on the way, so that a plan that says so need not find it."""
    return name.rpartition(".")[2] in (*_ROUTERS, "lm_head") or _ENCODERS.search(name) is not None


def _have_vllm_tell_plans_apart(of_plan: str) -> None:
    """Puts a plan's hash into the key of vLLM's compile cache, whose graphs have layers' settings as constants, and
    which knows a quantization by its name alone. May be called more than once."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return
    given = vllm_config.additional_config
    if isinstance(given, dict):
        vllm_config.additional_config = {**given, "flexq_plan": of_plan}
    else:
        vllm_config.additional_config = _WithPlan(given._given if isinstance(given, _WithPlan) else given, of_plan)


class _WithPlan:
    """Another's additional configuration, whose hash the plan is in too."""

    def __init__(self, given: Any, of_plan: str):
        self._given, self._of_plan = given, of_plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._given, name)

    def compute_hash(self) -> str:
        return hashlib.sha256((self._given.compute_hash() + self._of_plan).encode()).hexdigest()


def _vocabulary() -> int | None:
    """Of the model that is being loaded, if that is known."""
    vllm_config = get_current_vllm_config_or_none()
    return None if vllm_config is None else vllm_config.model_config.get_vocab_size()


def _block_of(name: str) -> str | None:
    """The block that a layer is in, as `model.layers.3`; None outside of all."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match and match[0]


def _holds_experts(layer: torch.nn.Module) -> bool:
    return any(word in type(layer).__name__ for word in ("FusedMoE", "RoutedExperts"))


@register_weight_loader_v2_supported_method
class FlexQLinearMethod(LinearMethodBase):
    """A linear layer of quantized weights; of several in one, each keeps its own activation bits and rotation."""

    uses_meta_device = False  # vLLM's word for what is quantized while it is read

    def __init__(self, config: FlexQVllmConfig, prefix: str, configs: list[LayerConfig]):
        self.config, self.prefix, self.configs = config, prefix, configs

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
        k, n = input_size_per_partition, sum(output_partition_sizes)
        loader = extra_weight_attrs["weight_loader"]
        layer.flexq_k, layer.flexq_sizes, layer.flexq_dtype = k, output_partition_sizes, params_dtype
        layer.flexq_loaded = set()
        self.is_checked = not fills_parameters_itself()
        if not self.config.is_checkpoint:
            # An LM head may be tied to what is loaded elsewhere.
            is_streamed = not isinstance(layer, ParallelLMHead) and not loads_sharded_state()
            weight = torch.empty(n, k, dtype=params_dtype, device="meta" if is_streamed else None)
            layer.register_parameter(
                "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
            )
            if is_streamed:
                quantize_while_loading(self, layer)
            return
        if k != input_size:
            check_input_split(self.prefix, input_size, input_size // k)
        groups, scheme = ops.num_groups(k), self.configs[0].scheme
        planes = torch.zeros(n, groups, self.configs[0].weight_bits, 16, dtype=torch.uint8)
        scales = torch.zeros(n, groups if scheme == "group" else 1, dtype=torch.float16)
        layer.register_parameter(
            "qweight",
            ModelWeightParameter(
                data=planes, input_dim=1, output_dim=0, weight_loader=self._checked(layer, "qweight", loader)
            ),
        )
        kind = GroupQuantScaleParameter if scheme == "group" else ChannelQuantScaleParameter
        dims = {"input_dim": 1, "output_dim": 0} if scheme == "group" else {"output_dim": 0}
        layer.register_parameter(
            "scales", kind(data=scales, weight_loader=self._checked(layer, "scales", loader), **dims)
        )

    def _checked(self, layer: torch.nn.Module, tensor: str, loader: Callable) -> Callable:
        """vLLM's loader, which would cast what does not fit."""
        name = f"{self.prefix}.{tensor}"
        kept = 2 if tensor == "qweight" else 0 if isinstance(layer, RowParallelLinear) else 1

        def load(layer, loader, param, loaded, *args, **kwargs):
            expected, given = (t.shape[kept:] if kept else () for t in (param, loaded))
            if loaded.dtype != param.dtype or loaded.dim() != param.dim() or given != expected:
                raise ValueError(
                    f"{name} must be {param.dtype} like {list(param.shape)}, got {loaded.dtype} {list(loaded.shape)}: "
                    "the checkpoint does not fit the model or its plan"
                )
            try:
                loader(param, loaded, *args, **kwargs)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"{name}: {list(loaded.shape)} does not fit {list(param.shape)} of a layer that is split over "
                    f"{param.tp_size} devices ({error})"
                ) from None
            shard = args[0] if args else kwargs.get("loaded_shard_id", kwargs.get("shard_id"))
            layer.flexq_loaded.add((tensor, shard))

        return method_of(layer, load, loader)

    def _check_complete(self, layer: torch.nn.Module) -> None:
        for tensor in ("qweight", "scales"):
            shards = {shard for name, shard in layer.flexq_loaded if name == tensor}
            parts = {part for shard in shards for part in (shard if isinstance(shard, tuple) else (shard,))}
            if None not in parts and len(parts) < len(layer.flexq_sizes):
                have = f" (of {len(layer.flexq_sizes)} parts only {sorted(map(str, parts))})" if parts else ""
                raise ValueError(f"the checkpoint has no {self.prefix}.{tensor}{have}: a shard is missing")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if is_processed(layer):
            return
        begin, packed, runs = 0, [], []
        self.config.check_all_placed()
        if self.uses_meta_device:
            require_read(layer, self.prefix)
        if self.config.is_checkpoint and self.is_checked:
            self._check_complete(layer)
        if self.config.is_checkpoint and loads_dummies():
            layer.scales.data.abs_()
        for size, config in self._runs(layer):
            rows = slice(begin, begin + size)
            if self.config.is_checkpoint:
                planes, scales = layer.qweight.data[rows], layer.scales.data[rows]
            else:
                try:
                    planes, scales = ops.quantize_weight(
                        layer.weight.data[rows], config.scheme, config.rotation, config.weight_bits
                    )
                except ValueError as error:
                    raise ValueError(f"{self.prefix}: {error}") from None
            ops.check_scales(scales)
            packed.append(ops.prepack(planes, scales, layer.flexq_k, config.scheme, config.rotation))
            runs.append((size, config.act_bits, config.scheme, config.rotation, config.weight_bits))
            begin += size
        layer.flexq_loaded.clear()
        for name in ("qweight", "scales", "weight"):
            if name in layer._parameters:
                delattr(layer, name)
        if getattr(layer, "_use_min_latency_gemm", False):  # DeepSeek's, of a weight in bf16
            layer._use_min_latency_gemm = False
        names = [_packed_name(index) for index in range(len(packed))]
        is_first = not hasattr(layer, "flexq_runs")
        layer.flexq_runs = runs
        keep_packed(layer, dict(zip(names, packed, strict=True)))
        if isinstance(layer, ParallelLMHead):
            add_stand_in(layer, packed[0].device)
        if is_first and self.config.is_checkpoint:
            layer.register_state_dict_post_hook(_add_canonical)
        mark_processed(layer)

    def _runs(self, layer: torch.nn.Module) -> list[tuple[int, LayerConfig]]:
        """Rows and settings of neighbours that are alike and so are one GEMM."""
        configs = self._configs_of_parts(layer)
        runs: list[tuple[int, LayerConfig]] = []
        for size, config in zip(layer.flexq_sizes, configs, strict=True):
            if runs and runs[-1][1] == config:
                runs[-1] = (runs[-1][0] + size, config)
            else:
                runs.append((size, config))
        return runs

    def _configs_of_parts(self, layer: torch.nn.Module) -> list[LayerConfig]:
        """Of each of vLLM's parts of the layer, of which the checkpoint may have several as one."""
        parts = len(layer.flexq_sizes)
        if len(set(self.configs)) == 1:
            return self.configs[:1] * parts
        if len(self.configs) != parts:
            raise ValueError(
                f"{self.prefix}: vLLM makes {parts} parts of {len(self.configs)} layers, to which the plan gives "
                "different settings; give them the same"
            )
        return self.configs

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outputs, begin = [], 0
        for index, (n, *settings) in enumerate(layer.flexq_runs):
            part = None if bias is None else bias[begin : begin + n]
            packed = getattr(layer, _packed_name(index))
            outputs.append(torch.ops.flexq.linear(x, packed, part, n, *settings))
            begin += n
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _packed_name(index: int) -> str:
    """vLLM's LoRA asks the first one which device the layer is on, by this name."""
    return "weight_packed" if index == 0 else f"weight_packed_{index}"


def _add_canonical(layer: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _) -> None:
    """What the layer was loaded from: what vLLM writes into a sharded state, and reads as it reads a checkpoint."""
    parts = [
        ops.unprepack(getattr(layer, _packed_name(index)), n, layer.flexq_k, scheme, rotation, weight_bits)
        for index, (n, _, scheme, rotation, weight_bits) in enumerate(layer.flexq_runs)
    ]
    for name, tensors in zip(("qweight", "scales"), zip(*parts, strict=True), strict=True):
        state[prefix + name] = torch.cat([tensor.cpu() for tensor in tensors])


def register() -> None:
    """vLLM's entry point `vllm.general_plugins`; may be called more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(FlexQVllmConfig)
