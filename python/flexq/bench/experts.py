"""`flexq bench experts`: a whole layer of a mixture of experts with random routing, against transformers' own in bf16.

Two GEMMs over the chosen experts, the activation between them, both quantizations and the weighted sum. The router is
left out: it is the same for all.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from flexq.bench.models import random_experts
from flexq.bench.peers import humming_layer
from flexq.bench.timing import Kernel, Kernels, cpu_seconds, graph_seconds, read_bandwidth
from flexq.plan import LayerConfig
from flexq.progress import Progress


@dataclass(frozen=True)
class ExpertsShape:
    """Of one layer.

    Args:
        experts, top_k: how many there are, and how many each token gets.
        hidden, intermediate: features outside and inside an expert.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = {
    "qwen3-30b-a3b": ExpertsShape(128, 8, 2048, 768),
    "mixtral-8x7b": ExpertsShape(8, 2, 4096, 14336),
    "gpt-oss-20b": ExpertsShape(32, 4, 2880, 2880),
    "deepseek-v3": ExpertsShape(256, 8, 7168, 2048),
}
CUDA_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
CPU_TOKENS = (1, 4, 16, 64)
_ROUTINGS = 4  # that calls go through in turn
_MOST_DISTANCE = 0.2  # of a peer's results from bf16's, relative
Peer = TypeVar("Peer")


@dataclass
class ExpertsPoint:
    """Median time of one way to run a layer.

    Args:
        shape, contender: which.
        m: tokens.
        microseconds: of the layer.
        floor_microseconds: to read the 6-bit weights of the distinct experts chosen, at the bandwidth measured
            in the same run.
        chosen: distinct experts, mean over the routings.
    """

    shape: str
    contender: str
    m: int
    microseconds: float
    floor_microseconds: float
    chosen: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _TransformersExperts:
    """transformers' experts in bf16, by each of its implementations that runs here."""

    def __init__(self, shape: ExpertsShape, device: str, dtype: torch.dtype):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )  # fmt: skip
        with torch.device("meta"):
            self.module = Qwen3MoeExperts(config)
        for name, parameter in list(self.module.named_parameters()):
            weight = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(std=0.02)
            setattr(self.module, name, nn.Parameter(weight, requires_grad=False))

    def calls(self, m: int) -> dict[str, Callable[..., Any]]:
        from transformers.integrations import moe

        found = {"bf16 grouped_mm": moe.grouped_mm_experts_forward}
        if m <= 16:  # copies the weights of every pair
            found["bf16 batched_mm"] = moe.batched_mm_experts_forward
        return {name: lambda *a, f=function: f(self.module, *a) for name, function in found.items()}

    @property
    def bytes(self) -> int:
        return sum(p.nbytes for p in self.module.parameters())


class _VllmExperts:
    """vLLM's fused experts (Triton), in bf16 and with fp8 weights and activations, one scale an expert."""

    def __init__(self, module: nn.Module):
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        self.fused = fused_experts
        self.half = (module.gate_up_proj.data, module.down_proj.data)
        self.float8, scales = [], []
        for weight in self.half:
            scale = weight.abs().amax(dim=(1, 2)).float() / torch.finfo(torch.float8_e4m3fn).max
            of_experts = zip(weight, scale, strict=True)
            self.float8.append(torch.stack([(w / s).to(torch.float8_e4m3fn) for w, s in of_experts]))
            scales.append(scale)
        self.config = fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1])

    def calls(self) -> dict[str, Callable[..., Any]]:
        def half(x, ids, weights):
            return self.fused(x, *self.half, weights.float(), ids.int())

        def float8(x, ids, weights):
            return self.fused(x, *self.float8, weights.float(), ids.int(), quant_config=self.config)

        return {"vLLM bf16": half, "vLLM fp8": float8}


class _HummingExperts:
    """Experts of the package humming-kernels: 6-bit weights and 8-bit activations, scales per group of 128.

    Its GEMMs find the rows of an expert by their indices, or take them sorted ("grouped"). It quantizes activations
    and, by index, sums up; the rest are vLLM's kernels, put together as in vLLM's own use of the package, which does
    not take 6-bit weights.

    Args:
        module: of whose weights.
        pairs: numbers of pairs of a token and an expert whose kernels to compile at once. Those of other numbers
            are compiled when they are first called for.
    """

    def __init__(self, module: nn.Module, pairs: Sequence[int] = ()):
        from humming.layer import HummingLayerMethod
        from humming.ops import moe_fused_mul_sum
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
        from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_permute, moe_unpermute

        self.configs = HummingLayerMethod.get_default_tuning_configs
        self.align, self.permute, self.unpermute, self.sum = (
            moe_align_block_size, moe_permute, moe_unpermute, moe_fused_mul_sum,
        )  # fmt: skip
        self.silu, self.activation = MoEActivation.SILU, apply_moe_activation
        weights = (module.gate_up_proj.data, module.down_proj.data)
        self.experts = weights[0].shape[0]
        self.layers = [humming_layer(weight, "W6A8") for weight in weights]
        for kind in ("indexed", "grouped_contiguous"):
            self._compile(kind, pairs)

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"Humming W6A8 indexed": self._indexed, "Humming W6A8 grouped": self._grouped}

    def _indexed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tunings = [self._tuning(layer, "indexed", ids.numel()) for layer in self.layers]
        rows = [tuning["block_shape"][0] for tuning in tunings]  # of a block
        aligned = {size: self.align(ids, size, self.experts) for size in set(rows)}

        def multiply(which: int, x: torch.Tensor, top_k: int) -> torch.Tensor:
            sorted_ids, expert_ids, padded = aligned[rows[which]]
            return self.layers[which](
                x, sorted_ids=sorted_ids, expert_ids=expert_ids, num_tokens_padded=padded, top_k=top_k,
                valid_shape_m=ids.numel(), compute_config={"gemm_type": "indexed"}, tuning_config=tunings[which],
            )  # fmt: skip

        y = multiply(1, self._activated(multiply(0, x, ids.shape[1])), 1)
        return self.sum(y.view(*ids.shape, -1), weights)

    def _grouped(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kind = "grouped_contiguous"
        tunings = [self._tuning(layer, kind, ids.numel()) for layer in self.layers]
        rows, _, offsets, places, _ = self.permute(x, None, ids, self.experts)

        def multiply(which: int, x: torch.Tensor) -> torch.Tensor:
            return self.layers[which](
                x, expert_layout=offsets, valid_shape_m=ids.numel(), compute_config={"gemm_type": kind},
                tuning_config=tunings[which],
            )  # fmt: skip

        y, out = multiply(1, self._activated(multiply(0, rows))), torch.empty_like(x)
        self.unpermute(out, y, weights.float(), places, offsets)
        return out

    def _activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        return self.activation(self.silu, out, gate_up)

    def _tuning(self, layer: nn.Module, kind: str, pairs: int) -> dict[str, Any]:
        """The package's choice of a kernel; all of its choices, which it would compile, are many."""
        configs = self.configs(layer, gemm_type=kind)
        return next(config for low, high, config in configs if low < pairs <= high)

    def _compile(self, kind: str, pairs: Sequence[int]) -> None:
        from humming.kernel.humming import HummingKernel

        for layer in self.layers:
            tunings: list[dict[str, Any]] = []
            for tuning in (self._tuning(layer, kind, count) for count in pairs):
                if tuning not in tunings:
                    tunings.append(tuning)
            if not tunings:
                continue  # of no choice at all, the package would compile every kernel
            ranges = [[0, 1 << 30, tuning] for tuning in tunings]
            meta = layer.humming_metas[""].to_str()
            with contextlib.suppress(Exception):  # the call that needs a kernel that does not compile says so
                HummingKernel.prepare_kernels(meta, {"gemm_type": kind}, ranges)


def bench_experts(
    shape: str = "qwen3-30b-a3b",
    tokens: Sequence[int] | None = None,
    device: str = "cpu",
    peers: bool = True,
    progress: Progress | None = None,
    report: Callable[[list[ExpertsPoint]], None] | None = None,
) -> list[ExpertsPoint]:
    """Time a layer of experts for each number of tokens; on a GPU in CUDA graphs.

    Args:
        shape: of SHAPES.
        tokens: values of M; CPU_TOKENS or CUDA_TOKENS if None.
        device: "cpu" or a CUDA device.
        peers: also transformers' experts in bf16 (grouped GEMMs, and batched ones of few tokens), if they fit, and,
            where they are installed, vLLM's fused ones in bf16 and fp8 and those of Humming with vLLM's kernels.
        progress: wraps the loop over numbers of tokens.
        report: called with the points of each M as soon as they are there.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
    size, on_gpu = SHAPES[shape], device != "cpu"
    dtype = torch.bfloat16
    torch.manual_seed(0)
    tokens = tokens or (CUDA_TOKENS if on_gpu else CPU_TOKENS)
    ours = {
        scheme: random_experts(LayerConfig(scheme=scheme), size.experts, size.hidden, size.intermediate, device, dtype)
        for scheme in ("group", "channel")
    }
    per_expert = ours["group"].stored_bytes / size.experts
    others = _transformers(size, device, dtype) if peers else None
    fused: list[_VllmExperts | _HummingExperts | None] = []
    if others is not None and on_gpu:
        pairs = [m * size.top_k for m in tokens]
        fused.append(_built("vLLM's experts", lambda: _VllmExperts(others.module)))
        fused.append(_built("Humming's experts", lambda: _HummingExperts(others.module, pairs)))
    points = []
    with torch.inference_mode():
        for m in progress(list(tokens)) if progress else tokens:
            routings = [_routing(size, m, device, dtype) for _ in range(_ROUTINGS)]
            chosen = sum(ids.unique().numel() for _, ids, _ in routings) / len(routings)
            read = int(per_expert * chosen)
            floor = read / read_bandwidth(read, device) * 1e6
            kernels: Kernels = {}
            for scheme, layer in ours.items():
                runs = [lambda r=r, layer=layer: layer.multiply(*r) for r in routings]
                kernels[f"flexq W6A8 {scheme}"] = Kernel(runs, read)
            calls = others.calls(m) if others is not None else {}
            for peer in fused:
                calls |= peer.calls() if peer is not None else {}
            expected: torch.Tensor | None = None
            for name, call in calls.items():
                runs = [lambda r=r, call=call: call(*r) for r in routings]
                try:
                    result = runs[0]()
                    expected = result if expected is None else expected
                    _require_near(result, expected)
                except Exception as error:  # a device or number of tokens that it does not do
                    warnings.warn(f"{name} is left out: {error!r}", stacklevel=2)
                    continue
                kernels[name] = Kernel(runs, others.bytes)
            seconds = graph_seconds(kernels) if on_gpu else cpu_seconds(kernels)
            row = [ExpertsPoint(shape, name, m, value * 1e6, floor, chosen) for name, value in seconds.items()]
            points += row
            if report is not None:
                report(row)
    return points


def _transformers(size: ExpertsShape, device: str, dtype: torch.dtype) -> _TransformersExperts | None:
    try:
        return _TransformersExperts(size, device, dtype)
    except (torch.OutOfMemoryError, ImportError):
        return None


def _built(name: str, build: Callable[[], Peer]) -> Peer | None:
    """What `build` returns; None if a package that it needs is not installed, or, with a warning, if it fails."""
    try:
        return build()
    except ImportError:
        return None
    except Exception as error:  # whatever a version of it does not do is left out, and said
        warnings.warn(f"{name} are left out: {error!r}", stacklevel=2)
        return None


def _require_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    """That a peer does what it is timed for: all have the same weights, of which 8 bits leave some percent."""
    distance = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
    if not distance < _MOST_DISTANCE:
        raise ValueError(f"its results are off by {distance:.2f} of bf16's")


def _routing(size: ExpertsShape, m: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x [m, H], and for each token top_k different experts and their weights, which sum to 1."""
    x = torch.randn(m, size.hidden, device=device, dtype=dtype)
    scores = torch.rand(m, size.experts, device=device)
    weights, ids = scores.topk(size.top_k, dim=-1)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)
