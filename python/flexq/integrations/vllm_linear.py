"""Linear layers in vLLM: their tensors as they are read, and then as the kernels read them."""

from collections.abc import Callable

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from flexq import ops
from flexq.integrations.vllm_embedding import add_stand_in
from flexq.integrations.vllm_weights import (
    fills_parameters_itself,
    is_pooling,
    is_processed,
    keep_packed,
    loads_dummies,
    loads_sharded_state,
    mark_processed,
    method_of,
    quantize_while_loading,
    require_read,
)
from flexq.plan import LayerConfig
from flexq.run.parallel import check_input_split


@register_weight_loader_v2_supported_method
class FlexQLinearMethod(LinearMethodBase):
    """A linear layer of quantized weights; of several in one, each keeps its own activation bits and rotation.

    Args:
        prefix: the layer's name.
        configs: settings of each layer that is part of it.
        is_checkpoint: whether its tensors are a FlexQ checkpoint's, not floating point ones to quantize.
        check: refuses a plan that does not fit the model; called once all layers exist.
    """

    uses_meta_device = False  # vLLM's word for what is quantized while it is read

    def __init__(self, prefix: str, configs: list[LayerConfig], is_checkpoint: bool, check: Callable[[], None]):
        self.prefix, self.configs = prefix, configs
        self.is_checkpoint, self.check = is_checkpoint, check

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
        self.may_be_missing = isinstance(layer, ParallelLMHead) and is_pooling()  # that loads no head
        if not self.is_checkpoint:
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
        if isinstance(layer, ReplicatedLinear):
            add_stand_in(layer, planes.device)  # some classes ask it for its dtype (Gemma 3n's modality router)

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
        self.check()
        if self.may_be_missing and not layer.flexq_loaded:
            return mark_processed(layer)
        if self.uses_meta_device:
            require_read(layer, self.prefix)
        if self.is_checkpoint and self.is_checked:
            self._check_complete(layer)
        if self.is_checkpoint and loads_dummies():
            layer.scales.data.abs_()
        for size, config in self._runs(layer):
            rows = slice(begin, begin + size)
            if self.is_checkpoint:
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
        layer.flexq_runs = runs
        by_name = {_packed_name(index): weight for index, weight in enumerate(packed)}
        keep_packed(layer, by_name, _add_canonical if self.is_checkpoint else None)
        if isinstance(layer, (ParallelLMHead, ReplicatedLinear)):
            add_stand_in(layer, packed[0].device)
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
