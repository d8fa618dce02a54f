"""Texts as windows of token ids, for evaluation, calibration and sensitivity alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from flexq.quantize.layers import input_embeddings

DEFAULT_WINDOW = 2048


def default_text() -> str:
    """The excerpt of WikiText-2's validation set that ships with the package (CC BY-SA)."""
    return (files("flexq") / "data" / "wikitext2-excerpt.txt").read_text(encoding="utf-8")


def read_text(path: str | Path | None) -> str:
    """A UTF-8 file's text, or the shipped excerpt. ValueError for other encodings."""
    if path is None:
        return default_text()
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


@dataclass(frozen=True)
class Limits:
    """What a model's input may be.

    Args:
        positions: tokens of a window; None where the configuration names no limit.
        vocabulary: ids below this; None for a model without token embeddings.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Limits":
        config = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
        found = [getattr(text, name, None) for name in names]
        positions = next((n for n in found if isinstance(n, int) and n > 0), None)
        if positions is not None and getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
            positions -= 2  # its first position is after the padding's
        weight = getattr(input_embeddings(model), "weight", None)
        return cls(positions, weight.shape[0] if isinstance(weight, torch.Tensor) else None)


def prefix_of(tokenizer) -> list[int]:
    """The ids that the tokenizer puts before a text: BOS, [CLS], or nothing."""
    with_special, plain = (_ids_of(tokenizer, "a", special).tolist() for special in (True, False))
    for begin in range(len(with_special) - len(plain) + 1):
        if with_special[begin : begin + len(plain)] == plain:
            return with_special[:begin]
    return []


def _ids_of(tokenizer, text: str, special: bool) -> torch.Tensor:
    """int64 [L], with or without what the tokenizer puts around a text."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False).input_ids[0].long()


def windows_of(
    tokenizer, text: str, length: int | None = None, count: int | None = None, model: nn.Module | None = None
) -> list[torch.Tensor]:
    """Cut a text into windows of `length` tokens, int64 [1, length], without overlap; a shorter rest is dropped.

    Each window begins with BOS (or [CLS]) where the tokenizer puts one before a text.

    Args:
        tokenizer: of transformers.
        text: any.
        length: tokens, BOS included; None for 2048, or as many as the model has positions.
        count: at most so many, spread evenly over the text; None for all.
        model: what the windows are for; they are then checked against its positions and its vocabulary.

    Raises:
        ValueError: a length below 2 or beyond the model's positions, a text shorter than one window, ids beyond the
            model's vocabulary.
    """
    limits = Limits() if model is None else Limits.of(model)
    if length is None:
        length = min(DEFAULT_WINDOW, limits.positions or DEFAULT_WINDOW)
    prefix = torch.tensor(prefix_of(tokenizer), dtype=torch.long)
    if length < 2 + len(prefix):
        raise ValueError(f"window length must be {2 + len(prefix)} or more, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"the number of windows must be 1 or more, got {count}")
    ids = _ids_of(tokenizer, text, special=False)
    if limits.vocabulary is not None and len(ids) and int(ids.max()) >= limits.vocabulary:
        raise ValueError(
            f"the tokenizer gives ids up to {int(ids.max())}, and the model has {limits.vocabulary} embeddings: they "
            "do not belong together"
        )
    step = length - len(prefix)
    available = len(ids) // step
    if available == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    if limits.positions is not None and length > limits.positions:
        raise ValueError(f"windows of {length} tokens are longer than the model's {limits.positions} positions")
    windows = [torch.cat([prefix, ids[i * step : (i + 1) * step]]).unsqueeze(0) for i in range(available)]
    return windows if count is None else spread(windows, count)


def spread(windows: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """`count` of a text's windows, or all that there are, evenly spaced: more of its subjects than the first ones."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]
