"""Benchmarks' points as tables and plots."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from flexq.bench.decode import DecodePoint
from flexq.bench.experts import ExpertsPoint
from flexq.bench.linear import Point
from flexq.plots import pyplot


def linear_table(points: Sequence[Point]) -> str:
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


def plot_linear(points: Sequence[Point], path: str | Path) -> None:
    """Throughput against M, a panel for each shape, to an image file."""
    shapes = list(dict.fromkeys((p.n, p.k) for p in points))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4), squeeze=False, layout="constrained")
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
    plt.close(figure)


def experts_table(points: Sequence[ExpertsPoint]) -> str:
    """A row for each number of tokens: the floor, microseconds of each contender, and ratios."""
    names = list(dict.fromkeys(p.contender for p in points))
    ours = [name for name in names if name.startswith("flexq")]
    peers = [name for name in names if name not in ours]
    rows = [["M", "experts", "floor", *names, "best / floor", *(f"{name} / best" for name in peers)]]
    for m, group in itertools.groupby(points, key=lambda p: p.m):
        at = {p.contender: p for p in group}
        best = min(at[name].microseconds for name in ours)
        first = next(iter(at.values()))
        rows.append(
            [str(m), f"{first.chosen:.1f}", f"{first.floor_microseconds:.1f}"]
            + [f"{at[name].microseconds:.1f}" if name in at else "-" for name in names]
            + [f"{best / first.floor_microseconds:.2f}"]
            + [f"{at[name].microseconds / best:.2f}" if name in at else "-" for name in peers]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "times in us; experts: distinct ones chosen; best: the faster of FlexQ's two schemes"])


def decode_table(points: Sequence[DecodePoint]) -> str:
    """A row for each batch and context, a column of milliseconds for each contender, then memory and breakdowns."""
    names = list(dict.fromkeys(p.contender for p in points))
    at = {(p.prefill, p.batch, p.context, p.contender): p for p in points}
    base = names[0]
    rows = [["what", "batch", "context", *names, "/ floor", *(f"x {n}" for n in names[1:])]]
    for prefill, batch, context in dict.fromkeys((p.prefill, p.batch, p.context) for p in points):
        row = [at.get((prefill, batch, context, name)) for name in names]
        first = row[0]
        cells = [f"{p.milliseconds:.2f}" if p else "-" for p in row]
        ratio = f"{first.milliseconds / first.floor_milliseconds:.2f}" if first and not prefill else ""
        others = [f"{p.milliseconds / first.milliseconds:.2f}" if p and first else "-" for p in row[1:]]
        rows.append(["prefill" if prefill else "step", str(batch), str(context), *cells, ratio, *others])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"milliseconds; '/ floor': {base} over reading its weights; 'x' columns: a peer's time over {base}'s")
    for name in names:
        mine = [p for p in points if p.contender == name]
        peak = max(p.peak_bytes for p in mine)
        memory = f", peak memory {peak / 1e9:.2f} GB" if peak else ""
        lines.append(f"{name}: weights {mine[0].weight_bytes / 1e9:.3f} GB{memory}")
        for p in mine:
            if p.breakdown:
                total = sum(p.breakdown.values())
                parts = ", ".join(
                    f"{kind} {value:.0f} us ({100 * value / total:.0f}%)" for kind, value in p.breakdown.items()
                )
                lines.append(f"  a step at batch {p.batch}, context {p.context}: {parts}")
    return "\n".join(lines)
