"""`flexq bench experts`: a whole layer of a mixture of experts with random routing, against transformers' own in bf16.

Two GEMMs over the chosen experts, the activation between them, both quantizations and the weighted sum. The router is
left out: it is the same for all.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from flexq.bench.models import random_experts
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
        peers: also transformers' experts in bf16 (grouped GEMMs, and batched ones of few tokens), if they fit, and
            vLLM's fused ones in bf16 and fp8, where it is installed.
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
    fused = _vllm(others) if others is not None and on_gpu else None
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
            calls = (others.calls(m) if others is not None else {}) | (fused.calls() if fused is not None else {})
            for name, call in calls.items():
                runs = [lambda r=r, call=call: call(*r) for r in routings]
                try:
                    runs[0]()
                except Exception as error:  # a device or number of tokens that it does not do
                    warnings.warn(f"{name} is left out: {error}", stacklevel=2)
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


def _vllm(others: _TransformersExperts) -> _VllmExperts | None:
    try:
        return _VllmExperts(others.module)
    except ImportError:
        return None
    except Exception as error:  # whatever a version of it does not do is left out, and said
        warnings.warn(f"vLLM's experts are left out: {error}", stacklevel=2)
        return None


def _routing(size: ExpertsShape, m: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x [m, H], and for each token top_k different experts and their weights, which sum to 1."""
    x = torch.randn(m, size.hidden, device=device, dtype=dtype)
    scores = torch.rand(m, size.experts, device=device)
    weights, ids = scores.topk(size.top_k, dim=-1)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)
