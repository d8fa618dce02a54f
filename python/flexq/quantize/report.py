"""Which share of a model's weights is quantized, and what is left."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexq.embedding import Embedding
from flexq.experts import ExpertWeights
from flexq.linear import Linear
from flexq.quantize.layers import input_embeddings, output_embeddings

WARN_BELOW = 0.8
_NAMED = 3  # of the largest weights that are left


@dataclass
class Coverage:
    """What of a model's weights is quantized.

    Args:
        quantized: weights (elements) in quantized layers.
        quantized_embeddings: in a quantized token embedding.
        embeddings: in token and position embeddings and the LM head, if they are not quantized.
        left: (name, elements) of every other tensor that is in floating point, the largest first.
    """

    quantized: int = 0
    quantized_embeddings: int = 0
    embeddings: int = 0
    left: list[tuple[str, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self._all_quantized + self.embeddings + sum(size for _, size in self.left)

    @property
    def _all_quantized(self) -> int:
        return self.quantized + self.quantized_embeddings

    @property
    def share(self) -> float:
        """Of all weights."""
        return self._all_quantized / max(self.total, 1)

    @property
    def share_inside(self) -> float:
        """Of the weights that are neither embeddings nor an LM head in floating point."""
        return self.quantized / max(self.total - self.embeddings - self.quantized_embeddings, 1)

    @property
    def warning(self) -> str | None:
        """A sentence, where much is left that one would expect to be quantized."""
        if self.share_inside >= WARN_BELOW:
            return None
        return f"only {self.sentence()}"

    def sentence(self) -> str:
        text = (
            f"{100 * self.share_inside:.1f}% of the weights outside embeddings and LM head are quantized "
            f"({100 * self.share:.1f}% of all)"
        )
        largest = [f"{name} ({_millions(size)})" for name, size in self.left[:_NAMED] if size * 100 > self.total]
        return text + (f"; left in floating point: {', '.join(largest)}" if largest else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized_weights": self._all_quantized,
            "all_weights": self.total,
            "share": self.share,
            "share_outside_embeddings": self.share_inside,
            "largest_left": dict(self.left[:_NAMED]),
        }


def _millions(size: int) -> str:
    return f"{size / 1e6:,.1f} million" if size >= 1e5 else f"{size:,}"


def coverage(model: nn.Module, to_quantize: Iterable[str] = ()) -> Coverage:
    """What of `model` is quantized, or would be once the layers named in `to_quantize` are.

    Args:
        model: in memory or on the meta device.
        to_quantize: names of layers that are not quantized yet, the token embedding's too.
    """
    result = Coverage()
    counted = set(to_quantize)
    embeddings = {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(m) for m in (input_embeddings(model), output_embeddings(model)) if m is not None}
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, ExpertWeights)):
            result.quantized += module.num_weights
        elif isinstance(module, Embedding):
            result.quantized_embeddings += module.num_weights
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if name in counted and isinstance(module, nn.Embedding):
                result.quantized_embeddings += tensor.numel()
            elif (name in counted and key == "weight") or f"{name}.{key}" in counted:
                result.quantized += tensor.numel()
            elif id(module) in embeddings:
                result.embeddings += tensor.numel()
            elif not isinstance(tensor, torch.nn.parameter.UninitializedParameter):
                sizes[f"{name}.{key}" if name else key] = tensor.numel()
    result.left = sorted(sizes.items(), key=lambda item: -item[1])
    return result
