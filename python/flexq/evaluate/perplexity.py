"""Perplexity and KL divergence to the unquantized model, on any text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.inputs import logits
from flexq.quantize.layers import linear_bytes

# Logits are turned to probabilities this many tokens at a time, so that what lies between stays in the cache.
_CHUNK = 32


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


def _log_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """In place where the logits are float32 already."""
    scores = scores.float()
    for begin in range(0, scores.shape[0], _CHUNK):
        part = scores[begin : begin + _CHUNK]
        part.copy_(part.log_softmax(-1))
    return scores


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

    Raises:
        ValueError: no windows, a model that predicts no tokens, vocabularies that differ, logits that are not finite.
    """
    if not windows:
        raise ValueError("evaluation needs at least one window of text")
    everyone = ({"unquantized": reference} if reference is not None else {}) | models
    sums = {name: _Sums() for name in everyone}
    steps = [(window, name) for window in windows for name in everyone]
    reference_log_p = None
    with torch.inference_mode():
        for window, name in progress(steps) if progress else steps:
            model = everyone[name]
            log_p = _log_probabilities(logits(model, window)[0, :-1])
            targets = window[0, 1:].to(log_p.device)
            if reference_log_p is not None and model is not reference and log_p.shape != reference_log_p.shape:
                raise ValueError(
                    f"{name} has {log_p.shape[1]} logits a token, the reference {reference_log_p.shape[1]}: KL "
                    "divergence needs the same vocabulary"
                )
            if model is reference:
                reference_log_p = log_p
                sums[name].add(log_p, targets, None)
            else:
                sums[name].add(log_p, targets, reference_log_p)
            del log_p
    results = []
    for name, model in everyone.items():
        s = sums[name]
        if not math.isfinite(s.nll) or not math.isfinite(s.kl):
            raise ValueError(f"{name} gives logits that are not finite on this text")
        has_kl = reference is not None and model is not reference
        stored, resident = linear_bytes(model)
        perplexity = math.exp(s.nll / s.tokens)
        change = perplexity / results[0].perplexity - 1 if has_kl else None
        kl = s.kl / s.tokens if has_kl else None
        results.append(Evaluation(name, perplexity, kl, s.tokens, stored, resident, change))
    return results
