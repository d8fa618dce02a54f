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

from flexq import _core, ops
from flexq.patch import Progress
from flexq.streams import stream_for

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


HUMMING_INPUTS = {"W6A8": {"dtype": "int8", "group_size": ops.GROUP_SIZE}, "W6A16": None}


def humming_layer(weight: torch.Tensor, inputs: str) -> nn.Module:
    """A layer of the package humming-kernels with 6-bit weights, a scale per group of 128.

    Args:
        weight: [N, K] on a GPU.
        inputs: of HUMMING_INPUTS.

    Raises:
        ImportError: the package is not installed.
    """
    from humming.layer import HummingLayer

    n, k = weight.shape
    config = HUMMING_INPUTS[inputs]
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "int6", "group_size": ops.GROUP_SIZE},
        input_config=None if config is None else dict(config),
        torch_dtype=torch.bfloat16,
    ).to(weight.device)
    layer.load_from_unquantized(weight.bfloat16())
    layer.transform()
    return layer


class _CudaPeers:
    """cuBLAS through PyTorch, and Humming where it is installed. cuBLAS int8 and fp8 are given activations that are
    quantized already; Humming quantizes them, as FlexQ does."""

    def __init__(self, weight: torch.Tensor):
        self.humming = self._humming(weight)
        self.half = self._copies(weight.bfloat16())
        self.int8 = self._copies((weight / weight.abs().max() * 127).round().to(torch.int8))
        self.fp8 = self._copies((weight / weight.abs().max() * 448).to(torch.float8_e4m3fn))
        self.one = torch.ones((), device=weight.device)

    @staticmethod
    def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
        count = max(2, int(_ROTATED_BYTES / weight.nbytes) + 1)
        return [weight, *(weight.clone() for _ in range(count - 1))]

    @staticmethod
    def _humming(weight: torch.Tensor) -> dict[str, list[nn.Module]]:
        """W6A8 and W6A16 with a scale per group of 128, one layer a copy of the weight."""
        copies = max(2, int(_ROTATED_BYTES / (weight.numel() * 49 / 64)) + 1)
        layers: dict[str, list[nn.Module]] = {}
        for name in HUMMING_INPUTS:
            try:
                for _ in range(copies):
                    layers.setdefault(f"Humming {name}", []).append(humming_layer(weight, name))
            except ImportError:
                return {}
            except Exception as error:  # whatever a version of it does not do is left out, and said
                warnings.warn(f"Humming {name} is left out: {error}", stacklevel=2)
                layers.pop(f"Humming {name}", None)
        return layers

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
        for name, layers in self.humming.items():
            size = sum(p.nbytes for p in layers[0].parameters())
            kernels[name] = _Kernel([lambda layer=layer: layer(half) for layer in layers], size)
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


def _triton_read() -> Callable[[torch.Tensor], Any] | None:
    """A kernel that does nothing but read a tensor of int32; None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def read(data, sums, size, block: tl.constexpr):
        index = tl.program_id(0) * block + tl.arange(0, block)
        values = tl.load(data + index, mask=index < size, other=0)
        tl.store(sums + tl.program_id(0), tl.sum(values))

    block = 8192

    def run(data: torch.Tensor) -> torch.Tensor:
        programs = -(-data.numel() // block)
        sums = torch.empty(programs, dtype=torch.int32, device=data.device)
        read[(programs,)](data, sums, data.numel(), block, num_warps=8)
        return sums

    return run


def read_bandwidth(size: int, device: str = "cpu") -> float:
    """Bytes per second at which `device` reads buffers of `size` bytes: the roof of a memory-bound kernel.

    On a GPU the best of PyTorch's reductions and, where Triton is, a kernel that only reads.
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
    buffers = [torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(copies)]
    halves = [(b[: size // 8], b[size // 8 : 2 * (size // 8)]) for b in buffers]
    readers = {
        "sum": _Kernel([lambda b=b: b.sum() for b in buffers], size),
        "dot": _Kernel([lambda h=h: torch.dot(*h) for h in halves], size),
    }
    read = _triton_read()
    if read is not None:
        readers["read"] = _Kernel([lambda b=b: read(b.view(torch.int32)) for b in buffers], size)
    return size / min(_graph_seconds(readers).values())


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
    report: Callable[[list[Point]], None] | None = None,
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
            floor, name_of_dtype = min(floors.values()) * 1e6, str(dtype).removeprefix("torch.")
            row = []
            for name, value in seconds.items():
                size, gops = kernels[name].weight_bytes, 2e-9 * m * n * k / value
                row.append(Point(name, n, k, m, name_of_dtype, value * 1e6, size, floor, gops))
            points += row
            if report is not None:
                report(row)
    return points


@dataclass
class Choice:
    """What the library's dispatcher chose for a GEMM, and what else could have run it.

    Args:
        n, k, m, act_bits, scheme: the GEMM.
        kernels: name, the model's microseconds and measured ones; the choice first.
    """

    n: int
    k: int
    m: int
    act_bits: int
    scheme: str
    kernels: list[tuple[str, float, float]]

    @property
    def best(self) -> tuple[str, float, float]:
        return min(self.kernels, key=lambda kernel: kernel[2])

    @property
    def regret(self) -> float:
        """How much longer the choice takes than the best, as a share."""
        return self.kernels[0][2] / self.best[2] - 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Kernels that the model puts further behind than this are not worth a measurement.
_EXPLAIN_WITHIN = 2.0


def _candidates(
    m: int, n: int, k: int, bits: int, scheme: str, packed: list[torch.Tensor]
) -> tuple[list[tuple[str, float]], _Kernels]:
    """Names and estimates of what could run the GEMM and is not out of the question, and how to run a layer with it."""
    where = packed[0].device
    x = torch.randn(m, k, device=where, dtype=torch.bfloat16)
    y = torch.empty(m, n, device=where, dtype=torch.bfloat16)
    desc = _core.WeightDesc(n, k, scheme, _ROTATION)
    bfloat16 = 2  # FLEXQ_BF16
    candidates = _core.gemm_kernels(stream_for(where), desc, bits, m)
    candidates = [c for c in candidates if c[1] <= _EXPLAIN_WITHIN * candidates[0][1]]

    def runner(name: str) -> Callable[[torch.Tensor], Callable[[], None]]:
        size = _core.linear_workspace_size(stream_for(where).with_kernel(name), desc, bits, m)
        workspace = torch.empty(size, dtype=torch.uint8, device=where)

        def run(weight: torch.Tensor) -> None:
            _core.linear(
                stream_for(where).with_kernel(name), desc, weight.data_ptr(), weight.numel(), bits, m, x.data_ptr(),
                bfloat16, k, 0, 0, y.data_ptr(), bfloat16, n, workspace.data_ptr(), size,
            )  # fmt: skip

        return lambda weight: lambda: run(weight)

    kernels = {}
    for name, _ in candidates:
        bind = runner(name)
        kernels[name] = _Kernel([bind(weight) for weight in packed], packed[0].numel())
    return candidates, kernels


def explain_linear(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    device: str = "cuda",
    configs: Sequence[tuple[int, str]] = DEFAULT_CONFIGS,
    progress: Progress | None = None,
) -> list[Choice]:
    """Measure whole linear layers with every kernel that could run the GEMM: is the choice right on this device?

    Args:
        as for `bench_linear`.
    """
    on_gpu = device != "cpu"
    shapes = shapes or (CUDA_SHAPES if on_gpu else CPU_SHAPES)
    tokens = tokens or (CUDA_TOKENS if on_gpu else CPU_TOKENS)
    where = torch.device(device)
    choices = []
    todo = [(shape, config, m) for shape in shapes for config in configs for m in tokens]
    current, packed = None, []
    with torch.inference_mode():
        for (n, k), (bits, scheme), m in progress(todo) if progress else todo:
            if (n, k, scheme) != current:
                current = (n, k, scheme)
                copies = max(2, int(_ROTATED_BYTES / (n * k * 49 / 64)) + 1) if on_gpu else 1
                packed = _packed(torch.randn(n, k, device=where) / k**0.5, scheme, copies)
            candidates, kernels = _candidates(m, n, k, bits, scheme, packed)
            seconds = _graph_seconds(kernels) if on_gpu else _cpu_seconds(kernels)
            measured = [(name, estimate, seconds[name] * 1e6) for name, estimate in candidates]
            choices.append(Choice(n, k, m, bits, scheme, measured))
    return choices


def explain_table(choices: Sequence[Choice]) -> str:
    """A row a GEMM: the choice, its time and the model's, the fastest, and what choosing that would save."""
    rows = [["N x K", "M", "format", "chosen", "us", "model", "fastest", "us", "saves"]]
    for c in choices:
        name, estimate, measured = c.kernels[0]
        saves = f"{100 * (1 - c.best[2] / measured):.0f}%" if c.best[0] != name else ""
        chosen = [f"{c.n}x{c.k}", str(c.m), f"W6A{c.act_bits} {c.scheme}", name, f"{measured:.1f}", f"{estimate:.1f}"]
        rows.append([*chosen, c.best[0], f"{c.best[2]:.1f}", saves])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    worst = max((c.regret for c in choices), default=0.0)
    changes = sum(c.best[0] != c.kernels[0][0] for c in choices)
    what = "whole layers, the model's time without their quantizers"
    note = f"{what}; by these measurements {changes} of {len(choices)} choices would change, the worst by"
    return "\n".join([*lines, f"{note} {100 * worst:.0f}%"])


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
