"""`flexq bench linear`: a whole linear layer, x in to y out, against what else a PyTorch user could pick."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.patch import Progress

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
CUDA_TOKENS = (1, 2, 4, 8, 16, 32)
DEFAULT_CONFIGS = ((8, "group"), (6, "group"), (8, "channel"))
_ROTATION = "hadamard128"
_SECONDS_PER_POINT = 0.6
_MIN_ROUNDS, _MAX_ROUNDS = 3, 100
# Weights that a GPU's kernels take turns on are together several times larger than its L2.
_ROTATED_BYTES = 400e6
_GRAPH_ROUNDS = 9


@dataclass
class Point:
    """Median time of one kernel at one shape.

    Args:
        kernel: "flexq W6A8 group", "torch float32", ...
        n, k, m: output features, input features, tokens.
        dtype: of x and y.
        microseconds: median over the rounds.
        weight_bytes: that the kernel reads.
        floor_microseconds: to read our weight once at the bandwidth measured in the same run on a buffer of its size.
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


@dataclass
class _Kernel:
    run: list[Callable[[], Any]]  # one a copy of the weight
    weight_bytes: int


_Kernels = dict[str, _Kernel]


def _packed(weight: torch.Tensor, scheme: str, copies: int) -> list[torch.Tensor]:
    packed = ops.prepack(*ops.quantize_weight(weight, scheme, _ROTATION), weight.shape[1], scheme, _ROTATION)
    return [packed, *(packed.clone() for _ in range(copies - 1))]


def _ours(x: torch.Tensor, packed: dict[str, list[torch.Tensor]], n: int, configs) -> _Kernels:
    def call(weight: torch.Tensor, bits: int, scheme: str) -> Callable[[], Any]:
        return lambda: torch.ops.flexq.linear(x, weight, None, n, bits, scheme, _ROTATION)

    return {
        f"flexq W6A{bits} {scheme}": _Kernel([call(w, bits, scheme) for w in packed[scheme]], packed[scheme][0].numel())
        for bits, scheme in configs
    }


class _CpuPeers:
    def __init__(self, weight: torch.Tensor):
        self.weight, self.half = weight, weight.bfloat16()
        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what a plain PyTorch user has
            self.dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)

    def kernels(self, x: torch.Tensor) -> _Kernels:
        x32, x16, size = x.float(), x.bfloat16(), self.weight.numel()
        return {
            "torch float32": _Kernel([lambda: nn.functional.linear(x32, self.weight)], 4 * size),
            "torch bfloat16": _Kernel([lambda: nn.functional.linear(x16, self.half)], 2 * size),
            "torch dynamic int8": _Kernel([lambda: self.dynamic(x32)], size),
        }


class _CudaPeers:
    """cuBLAS through PyTorch. int8 and fp8 are given activations that are quantized already."""

    def __init__(self, weight: torch.Tensor):
        self.half = self._copies(weight.bfloat16())
        self.int8 = self._copies((weight / weight.abs().max() * 127).round().to(torch.int8))
        self.fp8 = self._copies((weight / weight.abs().max() * 448).to(torch.float8_e4m3fn))
        self.one = torch.ones((), device=weight.device)

    @staticmethod
    def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
        count = max(2, int(_ROTATED_BYTES / weight.nbytes) + 1)
        return [weight, *(weight.clone() for _ in range(count - 1))]

    def kernels(self, x: torch.Tensor) -> _Kernels:
        half = x.bfloat16()
        rows = max(x.shape[0], 17)  # cuBLAS takes no fewer in int8
        int8 = torch.randint(-127, 128, (-(-rows // 8) * 8, x.shape[1]), dtype=torch.int8, device=x.device)
        fp8 = torch.randn(-(-x.shape[0] // 16) * 16, x.shape[1], device=x.device).to(torch.float8_e4m3fn)
        candidates: dict[str, tuple[list[torch.Tensor], Callable[[torch.Tensor], Any]]] = {
            "cuBLAS bfloat16": (self.half, lambda w: nn.functional.linear(half, w)),
            "cuBLAS int8": (self.int8, lambda w: torch._int_mm(int8, w.t())),
            "cuBLAS fp8": (
                self.fp8,
                lambda w: torch._scaled_mm(fp8, w.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.bfloat16),
            ),
        }
        kernels = {}
        for name, (weights, function) in candidates.items():
            try:
                function(weights[0])
            except RuntimeError:
                continue  # a shape or GPU that it does not do
            runs = [lambda w=w, function=function: function(w) for w in weights]
            kernels[name] = _Kernel(runs, weights[0].nbytes)
        return kernels


def _graph_seconds(kernels: _Kernels) -> dict[str, float]:
    """Median seconds of each kernel, from CUDA graphs that go through its copies twice and take turns."""
    graphs = {}
    for name, kernel in kernels.items():
        for call in kernel.run[:2]:
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in [*kernel.run, *kernel.run]:
                call()
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for round_ in range(_GRAPH_ROUNDS + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_ >= 2:  # the first ones warm up
                times[name].append(begin.elapsed_time(end) / 1e3 / (2 * len(kernels[name].run)))
    return {name: statistics.median(values) for name, values in times.items()}


def read_bandwidth(size: int, device: str = "cpu") -> float:
    """Bytes per second at which `device` reads buffers of `size` bytes: the roof of a memory-bound kernel.

    The best of PyTorch's reductions, which on a GPU and buffers below 100 MB stay behind what a kernel made for it
    reads; benchmarks/cuda_linear.cu has one.
    """
    if device == "cpu":
        data = torch.ones(size // 4, dtype=torch.int32)
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            data.sum(dtype=torch.int32)
            times.append(time.perf_counter() - begin)
        return size / min(times)
    copies = max(2, int(_ROTATED_BYTES / size) + 1)
    buffers = [torch.ones(size // 4, device=device) for _ in range(copies)]
    halves = [(b[: size // 8], b[size // 8 : 2 * (size // 8)]) for b in buffers]
    reductions = {
        "sum": _Kernel([lambda b=b: b.sum() for b in buffers], size),
        "dot": _Kernel([lambda h=h: torch.dot(*h) for h in halves], size),
    }
    return size / min(_graph_seconds(reductions).values())


def _cpu_seconds(kernels: _Kernels) -> dict[str, float]:
    """Median seconds of each kernel; they take turns, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    spent = 0.0
    for round_ in itertools.count():
        if round_ >= _MAX_ROUNDS or (round_ > _MIN_ROUNDS and spent > _SECONDS_PER_POINT * len(kernels)):
            break
        for name, kernel in kernels.items():
            begin = time.perf_counter()
            kernel.run[0]()
            elapsed = time.perf_counter() - begin
            spent += elapsed
            if round_ > 0:  # the first warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_linear(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    configs: Sequence[tuple[int, str]] = DEFAULT_CONFIGS,
    peers: bool = True,
    progress: Progress | None = None,
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
            last two without the quantization of their activations.
        progress: wraps the loop over points, e.g. `tqdm.tqdm`.
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
                copies = max(2, int(_ROTATED_BYTES / (n * k * 49 / 64)) + 1) if on_gpu else 1
                packed = {scheme: _packed(weight, scheme, copies) for scheme in dict.fromkeys(s for _, s in configs)}
                floors = {s: p[0].numel() / read_bandwidth(p[0].numel(), device) for s, p in packed.items()}
                if peers:
                    others = _CudaPeers(weight) if on_gpu else _CpuPeers(weight)
            x = torch.randn(m, k, generator=generator, device=device).to(dtype)
            kernels = _ours(x, packed, n, configs) | (others.kernels(x) if others is not None else {})
            seconds = _graph_seconds(kernels) if on_gpu else _cpu_seconds(kernels)
            floor = min(floors.values()) * 1e6
            for name, value in seconds.items():
                size, gops = kernels[name].weight_bytes, 2e-9 * m * n * k / value
                points.append(Point(name, n, k, m, str(dtype).removeprefix("torch."), value * 1e6, size, floor, gops))
    return points


def table(points: Sequence[Point]) -> str:
    """Rows of shapes and M: the floor, a column of microseconds a kernel, and ratios of the first kernel."""
    kernels = list(dict.fromkeys(p.kernel for p in points))
    others = [k for k in kernels if not k.startswith("flexq")]
    header = ["N x K", "M", "floor", *kernels, "/ floor", *(f"x {k}" for k in others)]
    rows = [header]
    for (n, k, m), group in itertools.groupby(points, key=lambda p: (p.n, p.k, p.m)):
        at = {p.kernel: p for p in group}
        times = {name: point.microseconds for name, point in at.items()}
        base, floor = times[kernels[0]], at[kernels[0]].floor_microseconds
        rows.append(
            [f"{n}x{k}", str(m), f"{floor:.1f}"]
            + [f"{times[name]:.1f}" if name in times else "-" for name in kernels]
            + [f"{base / floor:.2f}"]
            + [f"{times[name] / base:.2f}" if name in times else "-" for name in others]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    note = f"times in us; '/ floor': {kernels[0]} over the floor; 'x' columns: a peer's time over that of {kernels[0]}"
    return "\n".join([*lines, note])


def plot(points: Sequence[Point], path: str | Path) -> None:
    """Throughput against M, a panel for each shape, to an image file."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'flexq[plot]'") from None
    shapes = list(dict.fromkeys((p.n, p.k) for p in points))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4), squeeze=False, layout="constrained")
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        for kernel in dict.fromkeys(p.kernel for p in points):
            line = [(p.m, p.gops) for p in points if p.kernel == kernel and (p.n, p.k) == (n, k)]
            if line:
                style = "-" if "flexq" in kernel else "--"
                axis.plot(*zip(*line, strict=True), marker="o", label=kernel, linestyle=style)
        axis.set(title=f"{n} x {k}", xlabel="M (tokens)", ylabel="1e9 operations/s", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
