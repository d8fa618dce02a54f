"""`flexq bench linear`: a whole linear layer, x in to y out, against what else a PyTorch user could pick."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexq import ops
from flexq.bench.peers import CpuPeers, CudaPeers
from flexq.bench.timing import Kernel, Kernels, copies_of, cpu_seconds, graph_seconds, read_bandwidth
from flexq.progress import Progress

CPU_SHAPES = ((4096, 14336), (11008, 4096))
CPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CUDA_SHAPES = (
    (8192, 28672),
    (57344, 8192),
    (8192, 8192),
    (28672, 4096),
    (10240, 8192),
    (4096, 4096),
    (6144, 4096),
)
CUDA_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULT_CONFIGS = ((8, "group"), (6, "group"), (8, "channel"))
ROTATION = "hadamard128"


@dataclass
class Point:
    """Median time of one kernel at one shape.

    Args:
        kernel: "flexq W6A8 group", "torch float32", ...
        n, k, m: output features, input features, tokens.
        dtype: of x and y.
        microseconds: median over the rounds.
        weight_bytes: that the kernel reads.
        floor_microseconds: to read our weight of the kernel's bits once, at the bandwidth measured in the same run on
            a buffer of its size.
        gops: 2 * m * n * k over the time, in 1e9/s.
    """

    kernel: str
    n: int
    k: int
    m: int
    dtype: str
    microseconds: float
    weight_bytes: int
    floor_microseconds: float
    gops: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def packed_copies(weight: torch.Tensor, scheme: str, copies: int, weight_bits: int = 6) -> list[torch.Tensor]:
    canonical = ops.quantize_weight(weight, scheme, ROTATION, weight_bits)
    packed = ops.prepack(*canonical, weight.shape[1], scheme, ROTATION)
    return [packed, *(packed.clone() for _ in range(copies - 1))]


def ours(x: torch.Tensor, packed: dict[tuple[int, str], list[torch.Tensor]], n: int, configs) -> Kernels:
    """By name, of packed copies of a weight by weight_bits and scheme."""

    def call(weight: torch.Tensor, act_bits: int, scheme: str, weight_bits: int) -> Callable[[], Any]:
        return lambda: torch.ops.flexq.linear(x, weight, None, n, act_bits, scheme, ROTATION, weight_bits)

    return {
        f"flexq W{width}A{bits} {scheme}": Kernel([call(w, bits, scheme, width) for w in each], each[0].numel())
        for (width, of), each in packed.items()
        for bits, scheme in configs
        if scheme == of
    }


def bench_linear(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    configs: Sequence[tuple[int, str]] = DEFAULT_CONFIGS,
    peers: bool = True,
    progress: Progress | None = None,
    report: Callable[[list[Point]], None] | None = None,
    weight_bits: Sequence[int] = (6,),
) -> list[Point]:
    """Time y = linear(x), activation quantization and rotation included, for each shape N x K and M tokens.

    On a GPU every kernel runs in a CUDA graph over copies of the weight that its L2 cannot hold. On the CPU, choose
    weights larger than the cache, as in a model they are read from memory.

    Args:
        shapes: (N, K) pairs; CPU_SHAPES or CUDA_SHAPES if None.
        tokens: values of M; CPU_TOKENS or CUDA_TOKENS if None.
        dtype: of x and y; float32 on the CPU and bfloat16 on a GPU if None.
        device: "cpu" or "cuda".
        configs: (act_bits, scheme) of our kernels.
        peers: also time PyTorch's float32, bfloat16 and dynamic int8; on a GPU cuBLAS's bfloat16, int8 and fp8, the
            last two without the quantization of their activations, and Humming if it is installed.
        progress: wraps the loop over points, e.g. `tqdm.tqdm`.
        report: called with the points of each N x K and M as soon as they are there.
        weight_bits: of our kernels, each with all configs.
    """
    on_gpu = device != "cpu"
    shapes = shapes or (CUDA_SHAPES if on_gpu else CPU_SHAPES)
    tokens = tokens or (CUDA_TOKENS if on_gpu else CPU_TOKENS)
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    points = []
    todo = [(shape, m) for shape in shapes for m in tokens]
    current, packed, others, floors = None, {}, None, {}
    with torch.inference_mode():
        for shape, m in progress(todo) if progress else todo:
            n, k = shape
            if shape != current:
                packed, others, current = {}, None, shape
                weight = torch.randn(n, k, generator=generator, device=device) / k**0.5
                packed = {
                    (width, scheme): packed_copies(
                        weight, scheme, copies_of(n * k * (8 * width + 1) / 64) if on_gpu else 1, width
                    )
                    for width in weight_bits
                    for scheme in dict.fromkeys(s for _, s in configs)
                }
                floors = {}  # of each width, in the scheme with fewer bytes
                for (width, _), each in packed.items():
                    size = each[0].numel()
                    floors[width] = min(floors.get(width, torch.inf), size / read_bandwidth(size, device))
                if peers:
                    others = CudaPeers(weight) if on_gpu else CpuPeers(weight)
            x = torch.randn(m, k, generator=generator, device=device).to(dtype)
            kernels = ours(x, packed, n, configs) | (others.kernels(x) if others is not None else {})
            seconds = graph_seconds(kernels) if on_gpu else cpu_seconds(kernels)
            name_of_dtype = str(dtype).removeprefix("torch.")
            row = []
            for name, value in seconds.items():
                size, gops = kernels[name].weight_bytes, 2e-9 * m * n * k / value
                own = [floor for width, floor in floors.items() if name.startswith(f"flexq W{width}")]
                floor = (own or list(floors.values()))[0] * 1e6
                row.append(Point(name, n, k, m, name_of_dtype, value * 1e6, size, floor, gops))
            points += row
            if report is not None:
                report(row)
    return points
