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
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from flexq.checkpoint.layers import plan_of_settings
from flexq.checkpoint.source import QUANT_METHOD, CheckpointError, ModelError, find_model
from flexq.checkpoint.verify import verify_files
from flexq.embedding import CONFIG as EMBEDDING
from flexq.integrations.vllm_compile_key import have_vllm_tell_plans_apart
from flexq.integrations.vllm_embedding import EmbeddingMethod, with_embeddings_dequantized
from flexq.integrations.vllm_linear import FlexQLinearMethod
from flexq.integrations.vllm_loading import have_loader_pass, prepared
from flexq.integrations.vllm_names import MERGED, block_of, is_head, name_by, nearest_name, stays_anyway
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.quantize.layers import some

# What vLLM calls the files of sharded states, which have no checksums; with several devices in a pipeline, the second.
_SHARDED_STATES = ("model-rank-*", "model-pp-*")
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
        if folder is not None and not any(any(folder.glob(names)) for names in _SHARDED_STATES):
            verify_files(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Names of the checkpoint's layers to vLLM's, where a model renames them."""
        renamed = {name: name_by(hf_to_vllm_mapper, name) for name in self.plan.layers}
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
        here = {block_of(name) for name in self._placed} - {None}
        self._refuse([name for name in self._quantized() if name not in self._placed and block_of(name) in here])
        self._are_all_placed = True

    def _quantized(self) -> list[str]:
        """The plan's quantized layers, the embedding aside."""
        return [n for n, config in self.plan.layers.items() if config is not None and config != EMBEDDING]

    def _refuse(self, missing: list[str]) -> None:
        if missing:
            raise ValueError(
                f"the checkpoint has quantized {some(missing)}, which vLLM's class of this model has not, or not by "
                "such names: quantize it without them (--skip), or serve the floating point model with --quantization "
                "flexq"
            )

    def check_before_loading(self, model: torch.nn.Module, is_whole: bool = True) -> None:
        """The same before anything is loaded, of which vLLM's classes would say less: of any block, where the model is
        all that the checkpoint is of. Refuses a quantized LM head too that the model has no place for, unless its class
        leaves out heads (Cohere's, which are their embeddings)."""
        self.check_all_placed()
        if is_whole and _has_all_blocks():
            self._refuse([n for n in self._quantized() if n not in self._placed and block_of(n) is not None])
        heads = [n for n, c in self.plan.layers.items() if c is not None and is_head(n) and n not in self._placed]
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if (
            heads
            and mapper is not None
            and not mapper.apply_list([f"{self._of_checkpoint.get(heads[0], heads[0])}.weight"])
        ):
            logger.info_once(f"vLLM's class of this model has its embedding for an LM head: {heads[0]} is left out")
        elif heads and _has_all_blocks():
            raise ValueError(
                f"the checkpoint has a quantized {heads[0]}, for which vLLM's class of this model has no place: leave "
                "it in floating point (with tied embeddings those too), or serve the floating point model with "
                "--quantization flexq"
            )

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
        unknown = sorted(name for name in unknown if not stays_anyway(name))
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
        name = prefix.rpartition(".")[2]
        stem = prefix.removesuffix(name)
        if name in self.packed_modules_mapping:
            return [stem + part for part in self.packed_modules_mapping[name]]
        for merged in MERGED.get(name, ()) if self.is_checkpoint else ():
            parts = [stem + part for part in merged]
            if all(part in self.plan.layers for part in parts):
                return parts
        return [prefix]

    def _own_name(self, name: str) -> str:
        """The checkpoint's name of a layer, whatever its class tells."""
        if name in self.plan.layers or block_of(name) is None:
            return name
        return nearest_name(name, self.plan.layers.keys() - self._placed) or name

    def _layer_configs(self, prefix: str) -> list[LayerConfig | None]:
        """Settings of the layers that are one in vLLM."""
        names = self._parts(prefix)
        if self.is_checkpoint:
            names = [self._own_name(n) for n in names]
            if not any(n in self.plan.layers for n in names):
                names = [self._own_name(prefix)]  # merged in the checkpoint too
        self._placed.update(names)
        if self.is_checkpoint:
            configs = {n: self.plan.layers.get(n) for n in names}
            if len(names) == 3 and names[2] not in self.plan.layers:  # keys that are values too (Gemma 4)
                configs[names[2]] = configs[names[1]]
            return list(configs.values())
        return [self.plan.config_for(n) for n in names]

    def _take_names_of_base(self, prefix: str) -> None:
        """A checkpoint of a model without a head, whose names lack `model.`, which vLLM has before them."""
        base, name = "model.", prefix.removeprefix("model.")
        if name == prefix or any(n.startswith(base) for n in self.plan.layers):
            return
        if any(n in self.plan.layers for n in self._parts(name)):
            self._of_checkpoint = {base + n: self._of_checkpoint.get(n, n) for n in self.plan.layers}
            self.plan = replace(self.plan, layers={base + n: config for n, config in self.plan.layers.items()})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        prefix = prefix.lstrip(".")  # ModernBERT's, GPT-2's: of a model without a name
        if self.is_checkpoint and not self._placed:
            self._take_names_of_base(prefix)
        add_fusion_pass()
        have_vllm_tell_plans_apart(self._hash_of_plan)
        have_loader_pass(prepared)
        if self.plan.embeddings is not None:
            have_loader_pass(with_embeddings_dequantized)
        if isinstance(layer, ParallelLMHead):
            config = self.plan.layers.get(prefix)
            self._placed.add(prefix)
            if config is not None and self.is_checkpoint and _normalizes_head():
                raise ValueError(
                    f"{prefix}: vLLM normalizes this model's head as it loads it (norm_head), and the checkpoint's is "
                    "quantized: leave it in floating point"
                )
            return None if config is None else self._method_of_linear(prefix, [config])
        if isinstance(layer, VocabParallelEmbedding):
            return self._method_of_embedding(layer, prefix)
        if not isinstance(layer, LinearBase):
            return self._method_of_experts(layer, prefix) if _holds_experts(layer) else None
        if not self.is_checkpoint and stays_anyway(prefix) and not self._is_named(prefix):
            return UnquantizedLinearMethod()
        configs = self._layer_configs(prefix)
        if all(config is None for config in configs):
            return UnquantizedLinearMethod()
        if any(config is None for config in configs) or len({(c.scheme, c.weight_bits) for c in configs}) > 1:
            parts = [name.rpartition(".")[2] for name in self._parts(prefix)]
            raise ValueError(
                f"{prefix}: vLLM merges {', '.join(parts)}; a plan may give them different act_bits and rotations, but "
                "one scheme and weight_bits, and none of them may be left unquantized while others are not; it gives "
                + ", ".join("none" if c is None else f"{c.scheme} {c.weight_bits} bits" for c in configs)
            )
        return self._method_of_linear(prefix, configs)

    def _method_of_linear(self, prefix: str, configs: list[LayerConfig]) -> FlexQLinearMethod:
        return FlexQLinearMethod(prefix, configs, self.is_checkpoint, check=self.check_all_placed)

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
        found = {name for name, config in settings if config == EMBEDDING and block_of(name) is None}
        return found - self._placed

    def layers_without_place(self) -> dict[str, LayerConfig]:
        """By their names in the checkpoint, quantized layers beside the blocks that vLLM's class asks no method for:
        poolers and classifiers, which it has as plain layers or leaves out; once all layers exist."""
        names = [n for n in self._quantized() if n not in self._placed and block_of(n) is None and not is_head(n)]
        return {self._of_checkpoint.get(name, name): self.plan.layers[name] for name in names}

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


def _has_all_blocks() -> bool:
    """Whether this process has all of the model's layers, not a pipeline's part of them."""
    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is None or vllm_config.parallel_config.pipeline_parallel_size == 1


def _vocabulary() -> int | None:
    """Of the model that is being loaded, if that is known."""
    vllm_config = get_current_vllm_config_or_none()
    return None if vllm_config is None else vllm_config.model_config.get_vocab_size()


def _normalizes_head() -> bool:
    vllm_config = get_current_vllm_config_or_none()
    model_config = None if vllm_config is None else vllm_config.model_config
    return bool(getattr(getattr(model_config, "hf_config", None), "norm_head", False))


def _holds_experts(layer: torch.nn.Module) -> bool:
    return any(word in type(layer).__name__ for word in ("FusedMoE", "RoutedExperts"))


def register() -> None:
    """vLLM's entry point `vllm.general_plugins`; may be called more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(FlexQVllmConfig)
