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

DEFAULT_SHAPES = ((4096, 14336), (11008, 4096))
DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS_PER_POINT = 0.6
_MIN_ROUNDS, _MAX_ROUNDS = 3, 100


@dataclass
class Point:
    """Median time of one kernel at one shape.

    Args:
        kernel: "flexq W6A8 group", "torch float32", ...
        n, k, m: output features, input features, tokens.
        dtype: of x and y.
        microseconds: median over the rounds, all kernels taking turns in each.
        weight_bytes: that the kernel reads.
        gops: 2 * m * n * k over the time, in 1e9/s.
    """

    kernel: str
    n: int
    k: int
    m: int
    dtype: str
    microseconds: float
    weight_bytes: int
    gops: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Kernels = dict[str, tuple[Callable[[], Any], int]]


def _ours(x: torch.Tensor, weight: torch.Tensor, configs: Sequence[tuple[int, str]]) -> Kernels:
    kernels: Kernels = {}
    n, k = weight.shape
    for scheme in dict.fromkeys(scheme for _, scheme in configs):
        packed = ops.prepack(*ops.quantize_weight(weight, scheme, "hadamard128"), k, scheme, "hadamard128")
        for bits in (b for b, s in configs if s == scheme):

            def run(packed=packed, bits=bits, scheme=scheme):
                return torch.ops.flexq.linear(x, packed, None, n, bits, scheme, "hadamard128")

            kernels[f"flexq W6A{bits} {scheme}"] = (run, packed.numel())
    return kernels


def _cpu_peers(x: torch.Tensor, weight: torch.Tensor) -> Kernels:
    n, k = weight.shape
    x32, half = x.float(), weight.bfloat16()
    x16 = x.bfloat16()
    linear = nn.Linear(k, n, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what a plain PyTorch user has
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    return {
        "torch float32": (lambda: nn.functional.linear(x32, weight), 4 * n * k),
        "torch bfloat16": (lambda: nn.functional.linear(x16, half), 2 * n * k),
        "torch dynamic int8": (lambda: dynamic(x32), n * k),
    }


def read_bandwidth(size: int, rounds: int = 7) -> float:
    """Bytes per second at which this machine's threads read `size` bytes: the roof of a memory-bound kernel."""
    data = torch.ones(size // 4, dtype=torch.int32)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        data.sum(dtype=torch.int32)
        times.append(time.perf_counter() - begin)
    return size / min(times)


def _time(kernels: Kernels) -> dict[str, float]:
    """Median seconds of each kernel; they take turns, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    spent = 0.0
    for round_ in itertools.count():
        if round_ >= _MAX_ROUNDS or (round_ > _MIN_ROUNDS and spent > _SECONDS_PER_POINT * len(kernels)):
            break
        for name, (run, _) in kernels.items():
            begin = time.perf_counter()
            run()
            elapsed = time.perf_counter() - begin
            spent += elapsed
            if round_ > 0:  # the first warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_linear(
    shapes: Sequence[tuple[int, int]] = DEFAULT_SHAPES,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    dtype: torch.dtype = torch.float32,
    configs: Sequence[tuple[int, str]] = ((8, "group"), (6, "group"), (8, "channel")),
    peers: bool = True,
    progress: Progress | None = None,
) -> list[Point]:
    """Time y = linear(x), activation quantization and rotation included, for each shape N x K and M tokens.

    Args:
        shapes: (N, K) pairs; choose weights larger than the cache, as in a model they are read from memory.
        tokens: values of M.
        dtype: of x and y.
        configs: (act_bits, scheme) of our kernels.
        peers: also time PyTorch's float32, bfloat16 and dynamic int8.
        progress: wraps the loop over points, e.g. `tqdm.tqdm`.
    """
    generator = torch.Generator().manual_seed(0)
    points = []
    todo = [(shape, m) for shape in shapes for m in tokens]
    current, weight = None, torch.empty(0)
    with torch.inference_mode():
        for shape, m in progress(todo) if progress else todo:
            n, k = shape
            if shape != current:
                weight = torch.randn(n, k, generator=generator) / k**0.5
                current = shape
            x = torch.randn(m, k, generator=generator).to(dtype)
            kernels = _ours(x, weight, configs) | (_cpu_peers(x, weight) if peers else {})
            for name, seconds in _time(kernels).items():
                size = kernels[name][1]
                name_dtype = str(dtype).removeprefix("torch.")
                points.append(Point(name, n, k, m, name_dtype, seconds * 1e6, size, 2e-9 * m * n * k / seconds))
    return points


def table(points: Sequence[Point]) -> str:
    """Rows of shapes and M, a column of milliseconds a kernel, and our fastest against each peer."""
    kernels = list(dict.fromkeys(p.kernel for p in points))
    ours = [k for k in kernels if k.startswith("flexq")]
    header = ["N x K", "M", *kernels, *(f"x {k.removeprefix('torch ')}" for k in kernels if k not in ours)]
    rows = [header]
    for (n, k, m), group in itertools.groupby(points, key=lambda p: (p.n, p.k, p.m)):
        times = {p.kernel: p.microseconds for p in group}
        base = times[ours[0]]
        rows.append(
            [f"{n}x{k}", str(m)]
            + [f"{times[name] / 1e3:.2f}" for name in kernels]
            + [f"{times[name] / base:.2f}" for name in kernels if name not in ours]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"times in ms; 'x' columns: a peer's time over that of {ours[0]}"])


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
            axis.plot(*zip(*line, strict=True), marker="o", label=kernel, linestyle="-" if "flexq" in kernel else "--")
        axis.set(title=f"{n} x {k}", xlabel="M (tokens)", ylabel="1e9 operations/s", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
