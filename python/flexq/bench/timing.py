"""Timing kernels: in CUDA graphs over copies that L2 does not hold, taking turns; and the bandwidth of memory."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Weights that a GPU's kernels take turns on are together several times larger than its L2.
_ROTATED_BYTES = 400e6
_SECONDS_PER_POINT = 0.6
_MIN_ROUNDS, _MAX_ROUNDS = 3, 100
_GRAPH_ROUNDS = 9


@dataclass
class Kernel:
    run: list[Callable[[], Any]]  # one a copy of the weight
    weight_bytes: int


Kernels = dict[str, Kernel]


def copies_of(size: float) -> int:
    """How many copies of so many bytes a GPU's L2 is sure not to hold."""
    return max(2, int(_ROTATED_BYTES / size) + 1)


def graph_seconds(kernels: Kernels) -> dict[str, float]:
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


def cpu_seconds(kernels: Kernels) -> dict[str, float]:
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

    On a GPU the best of PyTorch's reductions and, where Triton is, a kernel that only reads; of 4 GB at most, beyond
    which the speed no longer changes and elements can no longer be counted in 32 bits.
    """
    if device == "cpu":
        data = torch.ones(size // 4, dtype=torch.int32)
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            data.sum(dtype=torch.int32)
            times.append(time.perf_counter() - begin)
        return size / min(times)
    size = min(size, 1 << 32)
    copies = copies_of(size)
    buffers = [torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(copies)]
    halves = [(b[: size // 8], b[size // 8 : 2 * (size // 8)]) for b in buffers]
    readers = {
        "sum": Kernel([lambda b=b: b.sum() for b in buffers], size),
        "dot": Kernel([lambda h=h: torch.dot(*h) for h in halves], size),
    }
    read = _triton_read()
    if read is not None:
        readers["read"] = Kernel([lambda b=b: read(b.view(torch.int32)) for b in buffers], size)
    return size / min(graph_seconds(readers).values())
