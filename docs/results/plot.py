#!/usr/bin/env python3
"""Draws the figures of the results from the tables in data/. Plain Python, and the same bytes on every run.

python3 docs/results/plot.py
"""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parent / "how-it-works" / "kernels"
INK, GRAY, GRID = "#222222", "#666666", "#e4e4e4"
GREEN, BLUE, ORANGE, RED, PURPLE, BROWN = "#1b7f3b", "#1f77b4", "#e08214", "#c0392b", "#7b4fa3", "#8c6d46"


def table(name: str) -> list[dict[str, str]]:
    """A table of data/; lines that begin with # say what it is."""
    with open(HERE / "data" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def number(text: str) -> str:
    return f"{float(text):,g}"


class Panel:
    """One plot in a figure: axes, lines, points and bars, in a rectangle of the page."""

    def __init__(self, left: float, top: float, width: float, height: float, title: str, parts: list[str]):
        self.left, self.top, self.width, self.height, self.parts = left, top, width, height, parts
        self.x_of: Callable[[float], float] = lambda v: v
        self.y_of: Callable[[float], float] = lambda v: v
        self.text(left, top - 22, title, size=13, weight="bold")

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", color: str = INK, size: int = 11, weight: str = ""
    ) -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        bold = f' font-weight="{weight}"' if weight else ""
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {where} fill="{color}" font-size="{size}"{bold}>{text}</text>')

    def path(self, points: Sequence[tuple[float, float]], color: str, width: float = 1, dash: str = "") -> None:
        shape = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="M{shape}" stroke="{color}" stroke-width="{width}" fill="none"{dashes}/>')

    @staticmethod
    def _scale(begin: float, end: float, at: float, length: float, log: bool) -> Callable[[float], float]:
        f = math.log if log else float
        return lambda v: at + (f(v) - f(begin)) / (f(end) - f(begin)) * length

    def axes(
        self, x: tuple[float, float], y: tuple[float, float], x_ticks: Sequence[float], y_ticks: Sequence[float],
        x_name: str, y_name: str, log_x: bool = True, log_y: bool = False,
    ) -> None:  # fmt: skip
        self.x_of = self._scale(*x, self.left, self.width, log_x)
        self.y_of = self._scale(*y, self.top + self.height, -self.height, log_y)
        right, bottom = self.left + self.width, self.top + self.height
        for tick in y_ticks:
            at = self.y_of(tick)
            self.path([(self.left, at), (right, at)], GRID)
            self.text(self.left - 6, at + 4, number(str(tick)), "end", GRAY)
        for tick in x_ticks:
            self.path([(self.x_of(tick), bottom), (self.x_of(tick), bottom + 4)], GRAY)
            self.text(self.x_of(tick), bottom + 16, number(str(tick)), "middle", GRAY)
        self.path([(self.left, bottom), (right, bottom)], GRAY)
        self.text(self.left + self.width / 2, bottom + 32, x_name, "middle", GRAY)
        self.text(self.left, self.top - 7, y_name, "start", GRAY)

    def line(self, points: Sequence[tuple[float, float]], color: str, name: str, width: float = 1.6, dash: str = ""):
        """A line; returns what `label` needs for its name at the right end."""
        placed = [(self.x_of(a), self.y_of(b)) for a, b in points]
        self.path(placed, color, width, dash)
        return placed[-1][1], name, color

    def label(self, ends: Sequence[tuple[float, str, str]]) -> None:
        """Names at the right, pushed apart where lines end close together."""
        floor = -math.inf
        for y, name, color in sorted(ends):
            floor = max(y + 4, floor + 13)
            self.text(self.left + self.width + 6, floor, name, color=color)

    def point(self, x: float, y: float, color: str, name: str, dx: float = 8, dy: float = 4, anchor: str = "start"):
        at = self.x_of(x), self.y_of(y)
        self.parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5" fill="{color}"/>')
        self.text(at[0] + dx, at[1] + dy, name, anchor, color)

    def bars(self, bars: Sequence[tuple[str, float, str]], unit: str, name_width: float = 120) -> None:
        """Lying bars with their names before and their values behind them."""
        step, longest = self.height / len(bars), max(value for _, value, _ in bars)
        for i, (name, value, color) in enumerate(bars):
            y, length = self.top + i * step, value / longest * (self.width - name_width - 90)
            self.text(self.left + name_width - 8, y + step / 2 + 4, name, "end")
            self.parts.append(
                f'<rect x="{self.left + name_width:.1f}" y="{y + 3:.1f}" width="{length:.1f}" height="{step - 6:.1f}" '
                f'fill="{color}"/>'
            )
            self.text(self.left + name_width + length + 6, y + step / 2 + 4, f"{value:,g} {unit}")


class Figure:
    def __init__(self, path: Path, width: int, height: int, title: str):
        self.path, self.foot = path, (width, height)
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def panel(self, left: float, top: float, width: float, height: float, title: str) -> Panel:
        return Panel(left, top, width, height, title, self.parts)

    def save(self) -> None:
        self.path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
LINEAR_SERIES = [
    ("w6a8_channel", GREEN, "FlexQ channel", 2.6),
    ("w6a8_group", BLUE, "FlexQ group", 2.6),
    ("fp8", ORANGE, "cuBLAS fp8", 1.4),
    ("int8", RED, "cuBLAS int8", 1.4),
    ("humming_w6a8", PURPLE, "Humming W6A8", 1.4),
    ("humming_w6a16", BROWN, "Humming W6A16", 1.4),
]


def linear_speed(panel: Panel, n: int, k: int) -> None:
    """How many times as fast as bf16 a linear layer is, by tokens."""
    rows = [r for r in table("linear-h100") if (int(r["n"]), int(r["k"])) == (n, k)]
    panel.axes((1, 8192), (0, 3), TOKENS, [0, 1, 2, 3], "tokens at a time", "times as fast as cuBLAS bf16")
    panel.path([(panel.x_of(1), panel.y_of(1)), (panel.x_of(8192), panel.y_of(1))], GRAY, 1, "4 3")
    ends = []
    for column, color, name, width in LINEAR_SERIES:
        points = [(float(r["tokens"]), float(r["bf16"]) / float(r[column])) for r in rows]
        ends.append(panel.line(points, color, name, width))
    panel.label(ends)


def accuracy(panel: Panel) -> None:
    """KL divergence by bits of a linear layer's weight."""
    panel.axes(
        (6, 10), (0.002, 0.2), [6, 7, 8, 9, 10], [0.005, 0.01, 0.02, 0.05, 0.1], "bits of a weight, as stored",
        "KL divergence from the unquantized model", log_x=False, log_y=True,
    )  # fmt: skip
    colors = {"FlexQ": GREEN, "INT8": RED, "llama.cpp": PURPLE, "paper": BROWN}
    for row in table("accuracy-smollm2"):
        color = next(c for start, c in colors.items() if row["what"].startswith(start))
        panel.point(float(row["bits"]), float(row["kl"]), color, row["label"])


def accuracy_alone() -> None:
    figure = Figure(HERE / "accuracy.svg", 560, 330, "KL divergence by bits of a weight")
    accuracy(figure.panel(60, 40, 420, 230, "SmolLM2-135M on WikiText-2"))
    figure.save()


def overview() -> None:
    figure = Figure(HERE / "overview.svg", 980, 330, "Speed against tokens, and accuracy against bits")
    linear_speed(figure.panel(50, 40, 320, 230, "Speed: a layer of 8192 x 28672 on an H100"), 8192, 28672)
    accuracy(figure.panel(560, 40, 380, 230, "Accuracy: SmolLM2-135M on WikiText-2"))
    figure.save()


def linear_h100() -> None:
    figure = Figure(HERE / "linear-h100.svg", 1010, 330, "Linear layers on an H100")
    for left, n, k in ((50, 8192, 28672), (555, 4096, 4096)):
        linear_speed(figure.panel(left, 40, 330, 230, f"{n} x {k}"), n, k)
    figure.save()


def limits() -> None:
    """A layer's time between its two limits: reading the weights, and the tensor cores."""
    int8_tops = 1939  # wgmma on int8, measured
    n, k = 8192, 28672
    rows = [r for r in table("linear-h100") if (int(r["n"]), int(r["k"])) == (n, k)]
    figure = Figure(KERNELS / "limits.svg", 640, 330, "Time of a linear layer and its limits")
    panel = figure.panel(60, 40, 420, 230, f"A layer of {n} x {k} on an H100")
    panel.axes(
        (1, 8192), (20, 8000), TOKENS, [50, 100, 500, 1000, 5000], "tokens at a time", "microseconds", log_y=True
    )
    floor = [(float(r["tokens"]), float(r["floor"])) for r in rows]
    roof = [(m, 2 * m * n * k / int8_tops / 1e6) for m, _ in floor if 2 * m * n * k / int8_tops / 1e6 > 20]
    ends = [panel.line(floor, GRAY, "reading the weights", 1.2, "4 3"), panel.line(roof, GRAY, "int8 peak", 1.2, "4 3")]
    for column, color, name in (("w6a8_group", BLUE, "scheme group"), ("w6a8_channel", GREEN, "scheme channel")):
        ends.append(panel.line([(float(r["tokens"]), float(r[column])) for r in rows], color, name, 2.4))
    panel.label(ends)
    figure.save()


def linear_cpu() -> None:
    figure = Figure(HERE / "linear-cpu.svg", 640, 330, "Linear layers on a CPU")
    panel = figure.panel(60, 40, 400, 230, "4096 x 14336 on 2 threads, AVX2")
    rows = [r for r in table("linear-cpu") if (int(r["n"]), int(r["k"])) == (4096, 14336)]
    panel.axes((1, 512), (0, 16), [1, 4, 16, 64, 256], [0, 4, 8, 12, 16], "tokens at a time", "times as fast as fp32")
    ends = []
    for column, color, name, width in (
        ("w6a8_group", GREEN, "FlexQ W6A8", 2.6),
        ("torch_dynamic_int8", RED, "torch dynamic int8", 1.4),
        ("torch_bfloat16", ORANGE, "torch bfloat16", 1.4),
    ):
        points = [(float(r["tokens"]), float(r["torch_float32"]) / float(r[column])) for r in rows]
        ends.append(panel.line(points, color, name, width))
    panel.label(ends)
    figure.save()


def experts() -> None:
    figure = Figure(HERE / "experts-h100.svg", 640, 330, "Layers of experts on an H100")
    panel = figure.panel(60, 40, 400, 230, "Layers of experts, the faster scheme")
    panel.axes((1, 4096), (0, 3), TOKENS, [0, 1, 2, 3], "tokens at a time", "times as fast as vLLM's bf16")
    ends = []
    for model, color in (("Qwen3-30B-A3B", GREEN), ("Mixtral-8x7B", BLUE), ("DeepSeek-V3", PURPLE)):
        rows = [r for r in table("experts-h100") if r["model"] == model and int(r["tokens"]) <= 4096]
        points = [
            (float(r["tokens"]), float(r["vllm_bf16"]) / min(float(r["w6a8_group"]), float(r["w6a8_channel"])))
            for r in rows
        ]
        ends.append(panel.line(points, color, model, 2.4))
    panel.label(ends)
    figure.save()


def serve() -> None:
    """Decode steps in vLLM, by the sequences that share one."""
    rows = [r for r in table("serve-steps-llama-3.1-8b-h100") if "step" in r["measurement"]]
    step = {int(r["measurement"].rpartition("_")[2]): r for r in rows}
    figure = Figure(HERE / "serve-h100.svg", 640, 330, "Steps of Llama-3.1-8B in vLLM on an H100")
    panel = figure.panel(60, 40, 400, 230, "A step of Llama-3.1-8B in vLLM on an H100")
    panel.axes((1, 256), (0, 2.5), list(step), [0, 0.5, 1, 1.5, 2, 2.5], "sequences at a time", "times as fast as bf16")
    panel.path([(panel.x_of(1), panel.y_of(1)), (panel.x_of(256), panel.y_of(1))], GRAY, 1, "4 3")
    ends = []
    for column, color, name, width in (
        ("flexq_channel", GREEN, "FlexQ W6A8", 2.6),
        ("fp8", ORANGE, "fp8", 1.4),
        ("humming_group", PURPLE, "Humming W6A8", 1.4),
    ):
        points = [(float(batch), float(r["bf16"]) / float(r[column])) for batch, r in step.items() if r[column]]
        ends.append(panel.line(points, color, name, width))
    panel.label(ends)
    figure.save()


def decode() -> None:
    row = next(r for r in table("decode-h100") if (r["model"], r["batch"]) == ("7B", "1"))
    names = {
        "w6a8_channel": ("FlexQ channel", GREEN), "w6a8_group": ("FlexQ group", GREEN), "w8a8": ("W8A8", RED),
        "fp8": ("fp8", ORANGE), "humming_w6a8": ("Humming W6A8", PURPLE), "bf16": ("bf16", GRAY),
    }  # fmt: skip
    figure = Figure(HERE / "decode-h100.svg", 640, 240, "A decode step of Llama-2-7B on an H100")
    panel = figure.panel(20, 40, 600, 190, "A decode step of Llama-2-7B, one sequence, on an H100")
    panel.bars([(name, float(row[column]), color) for column, (name, color) in names.items()], "ms")
    figure.save()


def text_on_a_cpu() -> None:
    rows = table("smollm2-cpu")
    figure = Figure(HERE / "smollm2-cpu.svg", 980, 190, "SmolLM2 on a CPU")
    for left, column, title in ((20, "decode", "Generating text"), (500, "prompt", "Reading a prompt of 512")):
        panel = figure.panel(left, 40, 470, 130, title)
        bars = [(r["what"], float(r[column]), PURPLE if "llama.cpp" in r["what"] else GREEN) for r in rows]
        panel.bars(bars, "tokens/s", 190)
    figure.save()


def main() -> None:
    for draw in (overview, accuracy_alone, linear_h100, limits, linear_cpu, experts, serve, decode, text_on_a_cpu):
        draw()


if __name__ == "__main__":
    main()
