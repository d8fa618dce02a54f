"""A figure with a heat map of layers, and room for a curve beside it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from flexq.plots import pyplot


@contextmanager
def heat_map(
    values: Mapping[str, float], what: str, path: str | Path, block_of: Callable[[str], int] | None, title: str
) -> Iterator:
    """Axes for a curve, beside a map of values, blocks by kinds of layer; written to an image file at the end.

    Args:
        values: by layers' names; their square roots are shown, those below 0 as 0.
        what: the map's title.
        path: of the image.
        block_of: a layer's block; by default the first number in its name.
        title: of the whole, or empty.

    Raises:
        ValueError: matplotlib is not installed.
    """
    block_of = block_of or (lambda name: next((int(part) for part in name.split(".") if part.isdigit()), 0))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in sorted(values)))
    grid = torch.zeros(len(kinds), max(map(block_of, values)) + 1)
    for name, value in values.items():
        grid[kinds.index(name.rpartition(".")[2]), block_of(name)] = max(value, 0.0)
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), width_ratios=(2, 1), layout="constrained")
    image = axes[0].imshow(grid.sqrt(), aspect="auto", cmap="viridis")
    axes[0].set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="block", title=what)
    figure.colorbar(image, ax=axes[0])
    yield axes[1]
    axes[1].grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
