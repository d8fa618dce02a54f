"""`flexq bench linear --explain`: every kernel that could run a GEMM, measured beside the dispatcher's choice."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexq import _core
from flexq.bench.linear import (
    CPU_SHAPES,
    CPU_TOKENS,
    CUDA_SHAPES,
    CUDA_TOKENS,
    DEFAULT_CONFIGS,
    ROTATION,
    packed_copies,
)
from flexq.bench.timing import Kernel, Kernels, copies_of, cpu_seconds, graph_seconds
from flexq.execution import stream_for
from flexq.progress import Progress


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


def cost_table(device: str) -> tuple[str, str]:
    """Name of the table that the dispatcher's estimates are made from, and its text."""
    return _core.cost_table(stream_for(torch.device(device)))


def _candidates(
    m: int, n: int, k: int, bits: int, scheme: str, packed: list[torch.Tensor], within: float
) -> tuple[list[tuple[str, float]], Kernels]:
    """Names and estimates of what could run the GEMM and is not out of the question, and how to run a layer with it."""
    where = packed[0].device
    x = torch.randn(m, k, device=where, dtype=torch.bfloat16)
    y = torch.empty(m, n, device=where, dtype=torch.bfloat16)
    desc = _core.WeightDesc(n, k, scheme, ROTATION)
    bfloat16 = 2  # FLEXQ_BF16
    candidates = _core.gemm_kernels(stream_for(where), desc, bits, m)
    candidates = [c for c in candidates if c[1] <= within * candidates[0][1]]

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
        kernels[name] = Kernel([bind(weight) for weight in packed], packed[0].numel())
    return candidates, kernels


def explain_linear(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    device: str = "cuda",
    configs: Sequence[tuple[int, str]] = DEFAULT_CONFIGS,
    progress: Progress | None = None,
    within: float = _EXPLAIN_WITHIN,
) -> list[Choice]:
    """Measure whole linear layers with every kernel that could run the GEMM: is the choice right on this device?

    Args:
        shapes, tokens, device, configs, progress: as for `bench_linear`.
        within: kernels that the model puts further behind the choice than this factor are not measured.
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
                copies = copies_of(n * k * 49 / 64) if on_gpu else 1
                packed = packed_copies(torch.randn(n, k, device=where) / k**0.5, scheme, copies)
            candidates, kernels = _candidates(m, n, k, bits, scheme, packed, within)
            seconds = graph_seconds(kernels) if on_gpu else cpu_seconds(kernels)
            measured = [(name, estimate, seconds[name] * 1e6) for name, estimate in candidates]
            choices.append(Choice(n, k, m, bits, scheme, measured))
    return choices


def table(choices: Sequence[Choice]) -> str:
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
