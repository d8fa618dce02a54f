"""Perplexity and KL divergence to the unquantized model, on any text."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq.baselines import quantize_model_int8
from flexq.patch import Progress, linear_bytes, quantize_model, shared_copy
from flexq.plan import RECIPES

DEFAULT_WINDOW = 2048
# Logits are turned to probabilities this many tokens at a time, so that what lies between stays in the cache.
_CHUNK = 32

COMPARED_RECIPES = ("w8a8", "paper", "w6a6", "w6a8")
LABELS = {
    "w8a8": "W8A8, per channel / per token (INT8)",
    "paper": "W6A6, down_proj A8, no rotation (paper's rule)",
    "w6a6": "W6A6, group rotation",
    "w6a8": "W6A8, group rotation (default)",
}


@dataclass
class Evaluation:
    """One model's figures.

    Args:
        name: what it is.
        perplexity: exp of the mean negative log likelihood of the next token.
        kl: mean over tokens of KL(reference || model) of the next-token distribution, in nats; None without reference.
        tokens: predictions that both are means over.
        disk_bytes: of the linear weights, LM head excluded, in a checkpoint.
        memory_bytes: of the same weights as resident.
        perplexity_change: relative to the reference; None without reference.
    """

    name: str
    perplexity: float
    kl: float | None
    tokens: int
    disk_bytes: int
    memory_bytes: int
    perplexity_change: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_text() -> str:
    """The excerpt of WikiText-2's validation set that ships with the package (CC BY-SA)."""
    return (files("flexq") / "data" / "wikitext2-excerpt.txt").read_text(encoding="utf-8")


def read_text(path: str | Path | None) -> str:
    if path is None:
        return default_text()
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def windows_of(tokenizer, text: str, length: int = DEFAULT_WINDOW, count: int | None = None) -> list[torch.Tensor]:
    """Cut a text into windows of `length` tokens, int64 [1, length], without overlap; a shorter rest is dropped.

    Raises:
        ValueError: length below 2, or a text shorter than one window.
    """
    if length < 2:
        raise ValueError(f"window length must be 2 or more, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"the number of windows must be 1 or more, got {count}")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    available = ids.shape[1] // length
    if available == 0:
        raise ValueError(f"the text has {ids.shape[1]} tokens, fewer than one window of {length}")
    return [ids[:, i * length : (i + 1) * length] for i in range(min(available, count or available))]


def spread(windows: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """`count` of a text's windows, or all that there are, evenly spaced: more of its subjects than the first ones."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


class _Sums:
    def __init__(self):
        self.nll = self.kl = 0.0
        self.tokens = 0

    def add(self, log_p: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        for begin in range(0, targets.numel(), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            self.nll -= log_p[part].gather(1, targets[part, None]).sum(dtype=torch.float64).item()
            if reference is not None:
                kl = nn.functional.kl_div(log_p[part], reference[part], reduction="sum", log_target=True)
                self.kl += kl.item()
        self.tokens += targets.numel()


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """In place where logits are float32 already."""
    logits = logits.float()
    for begin in range(0, logits.shape[0], _CHUNK):
        part = logits[begin : begin + _CHUNK]
        part.copy_(part.log_softmax(-1))
    return logits


def evaluate(
    models: dict[str, nn.Module],
    windows: Sequence[torch.Tensor],
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Perplexity of each model, and KL to `reference`, whose own figures come first in the result.

    The models go through the text side by side, so that only one window's logits of two models are held at a time.

    Args:
        models: by name.
        windows: as `windows_of` cuts them.
        reference: the unquantized model.
        progress: wraps the list of (window, name) steps, e.g. `tqdm.tqdm`.
    """
    everyone = ({"unquantized": reference} if reference is not None else {}) | models
    sums = {name: _Sums() for name in everyone}
    steps = [(window, name) for window in windows for name in everyone]
    reference_log_p = None
    with torch.inference_mode():
        for window, name in progress(steps) if progress else steps:
            model = everyone[name]
            device = next(model.parameters()).device
            log_p = _log_probabilities(model(window.to(device), use_cache=False).logits[0, :-1])
            targets = window[0, 1:].to(device)
            if model is reference:
                reference_log_p = log_p
                sums[name].add(log_p, targets, None)
            else:
                sums[name].add(log_p, targets, reference_log_p)
            del log_p
    results = []
    for name, model in everyone.items():
        s = sums[name]
        has_kl = reference is not None and model is not reference
        stored, resident = linear_bytes(model)
        perplexity = math.exp(s.nll / s.tokens)
        change = perplexity / results[0].perplexity - 1 if has_kl else None
        kl = s.kl / s.tokens if has_kl else None
        results.append(Evaluation(name, perplexity, kl, s.tokens, stored, resident, change))
    return results


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
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'flexq[plot]'") from None
    compared = [r for r in results if r.kl is not None]
    if not compared:
        raise ValueError("a plot compares models with a reference; give one")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(compared) + 1.6), sharey=True, layout="constrained")
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
    pyplot.close(figure)
