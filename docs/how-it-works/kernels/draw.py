#!/usr/bin/env python3
"""Draws this folder's SVGs. Plain Python, and the same bytes on every run.

python3 docs/how-it-works/kernels/draw.py
"""

from pathlib import Path

HERE = Path(__file__).parent
COLORS = ["#8ecae6", "#ffb703", "#a7c957", "#f4978e", "#cdb4db", "#ffd6a5", "#b8c0ff", "#d9d9d9"]
INK, GRAY, LIGHT = "#222222", "#777777", "#f3f3f3"


class Drawing:
    def __init__(self, name: str, width: int, height: int, title: str):
        self.name = name
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="12">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = INK, text: str = ""
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width=".6"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4, text, anchor="middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", color: str = INK, size: int = 12) -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        style = "" if size == 12 else f' font-size="{size}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}"{style}>{text}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = GRAY, arrow: bool = False) -> None:
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" fill="none"/>')
        if arrow:
            length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
            ux, uy = (x2 - x1) / length * 7, (y2 - y1) / length * 7
            points = (
                f"{x2:g},{y2:g} {x2 - ux - uy / 2:g},{y2 - uy + ux / 2:g} {x2 - ux + uy / 2:g},{y2 - uy - ux / 2:g}"
            )
            self.parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def save(self) -> None:
        (HERE / self.name).write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def record() -> None:
    d = Drawing("record.svg", 860, 400, "A record of 16 rows x 128 inputs: 1536 bytes")
    left, cell = 90, 23
    d.text(left, 16, "One record: 16 rows x 128 k = 1536 bytes = 3 vectors x 32 lanes x 16 bytes. lane = 4 g + t:")
    d.text(left, 32, "one colour is one g, rows g and g + 8. A warp reads a vector as 512 bytes in a row.")
    for vector in range(3):
        y = 42 + vector * 34
        d.text(left - 8, y + 19, f"vector {vector}", anchor="end")
        for lane in range(32):
            d.box(left + lane * cell, y, cell, 28, COLORS[lane // 4], text=str(lane))
    chosen, y = 13, 190
    d.line(left + chosen * cell, 138, left, y)
    d.line(left + (chosen + 1) * cell, 138, left + 4 * 180, y)
    d.text(left - 8, y + 19, f"lane {chosen}", anchor="end")
    for s in range(4):
        d.box(
            left + s * 180,
            y,
            180,
            28,
            COLORS[chosen // 4],
            text=f"word {s}: k = {32 * s} ... {32 * s + 31}",
        )

    y = 262
    d.line(left, 218, left, y)
    d.line(left + 180, 218, left + 4 * 180, y)
    d.text(left - 8, y + 19, "a word", anchor="end")
    for i in range(4):
        d.box(left + i * 180, y, 180, 28, LIGHT, text=f"byte {i}: k = 32 s + 4 t + {i}")

    y = 334
    d.line(left, 290, left, y)
    d.line(left + 180, 290, left + 4 * 180, y)
    d.text(left - 8, y + 19, "a byte", anchor="end")
    for bit in range(8):
        low = bit >= 6
        d.box(left + bit * 90, y, 90, 28, COLORS[1] if low else COLORS[0], text=f"bit {7 - bit}")
    d.text(left + 270, y + 44, "code of vector j: a signed byte 4 x code after one mask", anchor="middle")
    d.text(left + 630, y + 44, "2 bits of the fourth code", anchor="middle")
    d.save()


def tile() -> None:
    d = Drawing("tile.svg", 860, 430, "A CTA's tile of y in the wgmma GEMM")
    d.text(20, 22, "Weights: 128 rows, K in groups of 128")
    for row in range(8):
        for group in range(4):
            d.box(60 + group * 70, 40 + row * 32, 70, 32, COLORS[row // 4 * 2], text="record")
        d.text(54, 60 + row * 32, str(16 * row), anchor="end", color=GRAY, size=10)
    d.text(344, 172, "...", size=16)
    d.box(60, 40, 70, 256, stroke="#c1121f")
    d.text(60, 316, "red: one group of the tile,")
    d.text(60, 332, "8 records in one bulk copy")

    d.text(400, 22, "Activations: tiles of 8 tokens x 128 k, 1 KB each")
    for group in range(4):
        for token in range(6):
            d.box(400 + token * 66, 40 + group * 18, 66, 18, COLORS[1])
    d.text(800, 60, "...", size=16)
    d.box(400, 40, 396, 18, stroke="#c1121f")
    d.text(400, 130, "red: one group of the tile's tokens, one bulk copy")

    d.text(400, 168, "y: 128 rows x tokens")
    for warp in range(8):
        d.box(400, 180 + warp * 26, 396, 26, COLORS[warp // 4 * 2])
        d.text(598, 197 + warp * 26, f"warp {warp}: rows {16 * warp} ... {16 * warp + 15}", anchor="middle")
    d.text(400, 408, "blue: consumer warpgroup 0, green: 1. A warp unpacks its 16 rows into registers")
    d.text(400, 424, "(A); the activations are B, straight from shared memory.")
    d.save()


def pipeline() -> None:
    d = Drawing("pipeline.svg", 860, 330, "The pipeline of stages between producers and consumers")
    left, unit, stages = 150, 74, 3
    rows = {"producer: weights": 40, "producer: activations": 80, "consumer: unpack": 150, "tensor cores": 190}
    for name, y in rows.items():
        d.text(left - 10, y + 19, name, anchor="end")
        d.line(left, y + 34, 850, y + 34, "#dddddd")
    # Copies run ahead of the products until the stages are full; then each waits for a release.
    copies = [0.0, 1.0, 2.0, 4.15, 5.15, 6.15, 7.15]
    products = [3.1, 4.1, 5.1, 6.1, 7.1, 8.1]
    for step, at in enumerate(copies):
        d.box(
            left + at * unit, rows["producer: weights"], unit, 26, COLORS[step % stages], text=f"stage {step % stages}"
        )
    for step, at in enumerate([1.3, 1.9, 2.5, *copies[3:]]):
        d.box(
            left + at * unit, rows["producer: activations"], unit * (0.6 if step < 3 else 1), 26, COLORS[step % stages]
        )
    for step, at in enumerate(products):
        d.box(left + (at - 0.7) * unit, rows["consumer: unpack"], unit * 0.5, 26, COLORS[step % stages])
        d.box(left + at * unit, rows["tensor cores"], unit * 0.96, 26, COLORS[step % stages], text=f"step {step}")
    x = left + 1.3 * unit
    d.line(x, 30, x, 235, "#c1121f")
    d.text(x + 4, 250, "the kernel ahead has finished: activations may be read", color="#c1121f")
    d.line(left + 1.9 * unit, 106, left + 2.35 * unit, 150, arrow=True)
    d.text(left + 1.35 * unit, 132, "full: all bytes are there", anchor="start")
    d.line(left + 4.1 * unit, 190, left + 4.2 * unit, 66, arrow=True)
    d.text(left + 4.9 * unit, 132, "empty: every consumer warp has released the stage")
    d.text(
        20,
        285,
        "Colours are stages. Copies of weights start before the kernel ahead has finished: the pipeline is full of",
    )
    d.text(
        20, 302, "weights when activations come. A stage is copied to again once the products that read it are done."
    )
    d.save()


def experts() -> None:
    d = Drawing("experts.svg", 860, 250, "Pairs of tokens and experts, sorted into tiles")
    d.text(20, 22, "ids: 5 tokens, top 2")
    ids = [(2, 0), (0, 3), (2, 3), (0, 2), (2, 3)]
    for token, chosen in enumerate(ids):
        d.text(20, 55 + token * 26, f"token {token}")
        for j, expert in enumerate(chosen):
            d.box(70 + j * 34, 38 + token * 26, 34, 26, COLORS[expert], text=str(expert))
    pairs = [(expert, token) for expert in range(4) for token, chosen in enumerate(ids) if expert in chosen]
    unit, left, tile = 34, 220, 2
    d.text(left, 22, "quantized activations: each expert begins a tile (here of 2 tokens)")
    d.text(left, 122, "outputs: no gaps")
    place = 0
    for row, (expert, token) in enumerate(pairs):
        if row and pairs[row - 1][0] != expert:
            place = (place + tile - 1) // tile * tile
        d.box(left + place * unit, 38, unit, 26, COLORS[expert], text=f"t{token}")
        d.line(left + (place + 0.5) * unit, 66, left + (row + 0.5) * unit, 130, arrow=True)
        d.box(left + row * unit, 132, unit, 26, COLORS[expert], text=f"t{token}")
        place += 1
    for number in range((place + tile - 1) // tile):
        d.box(left + number * tile * unit, 36, tile * unit, 30, stroke="#c1121f")
        d.text(left + (number + 0.5) * tile * unit, 80, f"tile {number}", anchor="middle", color="#c1121f")
    d.text(left, 190, "A tile is a linear layer: the weights are its expert's. Expert 1 has no pair and is not read.")
    d.text(left, 208, "Tokens keep their order within an expert. The sum of a token's outputs goes by its ids again.")
    d.save()


if __name__ == "__main__":
    record()
    tile()
    pipeline()
    experts()
