"""What `flexq sensitivity --weights` draws: a heat map of what fewer bits cost, and the frontier of bits against KL."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flexq.planning import widths
from flexq.planning.heat_map import heat_map
from flexq.planning.widths import WidthSensitivity


def plot(
    ranking: Sequence[WidthSensitivity],
    groups: Sequence[Sequence[str]],
    path: str | Path,
    block_of: Callable[[str], int] | None = None,
    title: str = "",
) -> None:
    """To an image file.

    Args:
        ranking, groups: of `widths.estimate` and `widths.groups_of`.
        path: of the image.
        block_of: a layer's block; by default the first number in its name.
        title: what was measured: model, text.
    """
    values = {layer.name: 1e6 * (layer.kl[5] - layer.kl[6]) / layer.parameters for layer in ranking}
    what = "square root of the KL that 5 bits add to 6, a million weights (nats a token)"
    total = sum(layer.parameters for layer in ranking)
    best = [(point.price / total, point.kl) for point in widths.frontier(ranking, groups)]
    uniform = [(bits, sum(layer.kl[bits] for layer in ranking)) for bits in sorted(ranking[0].kl)]
    with heat_map(values, what, path, block_of, title) as axes:
        axes.plot(*zip(*best, strict=True), label="bits by layer")
        axes.plot(*zip(*uniform, strict=True), "o--", label="the same bits everywhere")
        axes.set(xlabel="weight bits in the mean", ylabel="KL (nats a token)", yscale="log", title="frontier")
        axes.legend()
