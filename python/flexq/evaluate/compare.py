"""A model beside its quantized forms: recipes, INT8, a plot."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from flexq.evaluate.int8 import quantize_model_int8
from flexq.evaluate.perplexity import Evaluation
from flexq.plan import RECIPES
from flexq.plots import pyplot
from flexq.progress import Progress
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model

COMPARED_RECIPES = ("w8a8", "paper", "w6a6", "w6a8")
LABELS = {
    "w8a8": "W8A8, per channel / per token (INT8)",
    "paper": "W6A6, down_proj A8, no rotation (paper's rule)",
    "w6a6": "W6A6, group rotation",
    "w6a8": "W6A8, group rotation (default)",
}


def with_recipe(model: nn.Module, recipe: str, progress: Progress | None = None) -> nn.Module:
    """`model` quantized by a recipe's name or "w8a8", sharing all that is not quantized with it.

    Raises:
        ValueError: the recipe is unknown.
    """
    quantize: dict[str, Callable[[nn.Module], nn.Module]] = {
        name: lambda m, plan=plan: quantize_model(m, plan, progress=progress) for name, plan in RECIPES.items()
    }
    quantize["w8a8"] = quantize_model_int8
    if recipe not in quantize:
        raise ValueError(f"unknown recipe {recipe!r}; built in are {', '.join(quantize)}")
    return quantize[recipe](shared_copy(model))


def plot(results: Iterable[Evaluation], path: str | Path) -> None:
    """Perplexity change and KL of each format as bars, to an image file."""
    plt = pyplot()
    compared = [r for r in results if r.kl is not None]
    if not compared:
        raise ValueError("a plot compares models with a reference; give one")
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(compared) + 1.6), sharey=True, layout="constrained")
    names = [r.name for r in compared]
    panels = (
        (
            axes[0],
            [100 * (r.perplexity_change or 0.0) for r in compared],
            "perplexity above unquantized (%)",
            "{:+.2f}%",
        ),
        (axes[1], [r.kl for r in compared], "KL divergence to unquantized (nats)", "{:.4f}"),
    )
    for axis, values, title, text in panels:
        bars = axis.barh(names, values, color="#4878a8")
        axis.bar_label(bars, [text.format(v) for v in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
