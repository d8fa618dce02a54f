"""What `flexq sensitivity --weights` draws: a heat map of what fewer bits cost, and the frontier of bits against KL."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexq.planning import widths
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
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'flexq[plot]'") from None
    block_of = block_of or (lambda name: next((int(part) for part in name.split(".") if part.isdigit()), 0))
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in sorted(ranking, key=lambda x: x.name)))
    grid = torch.zeros(len(kinds), max(block_of(layer.name) for layer in ranking) + 1)
    for layer in ranking:
        at = kinds.index(layer.name.rpartition(".")[2]), block_of(layer.name)
        grid[at] = 1e6 * max(layer.kl[5] - layer.kl[6], 0.0) / layer.parameters
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4), width_ratios=(2, 1), layout="constrained")
    image = axes[0].imshow(grid.sqrt(), aspect="auto", cmap="viridis")
    axes[0].set(
        yticks=range(len(kinds)),
        yticklabels=kinds,
        xlabel="block",
        title="square root of the KL that 5 bits add to 6, a million weights (nats a token)",
    )
    figure.colorbar(image, ax=axes[0])
    total = sum(layer.parameters for layer in ranking)
    best = [(point.price / total, point.kl) for point in widths.frontier(ranking, groups)]
    uniform = [(bits, sum(layer.kl[bits] for layer in ranking)) for bits in sorted(ranking[0].kl)]
    axes[1].plot(*zip(*best, strict=True), label="bits by layer")
    axes[1].plot(*zip(*uniform, strict=True), "o--", label="the same bits everywhere")
    axes[1].set(xlabel="weight bits in the mean", ylabel="KL (nats a token)", yscale="log", title="frontier")
    axes[1].grid(alpha=0.3)
    axes[1].legend()
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
