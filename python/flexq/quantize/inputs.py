"""Calling any text model of transformers with a window of token ids: decoders, encoders, encoder-decoders."""

import inspect
from typing import Any

import torch
from torch import nn

from flexq.quantize.layers import input_embeddings


def arguments(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Keywords for `model(**...)`: the ids [1, L] as its input, for an encoder-decoder as both sides', no cache.

    Raises:
        ValueError: a model whose input is no text, such as a speech recognizer.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {main}, not text; calibration, sensitivity and evaluation need a model that "
            "reads token ids (quantize it without --calibrate)"
        )
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if "input_ids" not in accepted and not takes_any:
        raise ValueError(f"{type(model).__name__} takes no input_ids: it is no model of transformers that reads text")
    weights = [getattr(input_embeddings(model), "weight", None), *model.parameters()]
    there = (w.device for w in weights if isinstance(w, torch.Tensor) and w.device.type != "meta")
    device = next(there, torch.device("cpu"))
    ids = ids.to(device)
    keywords: dict[str, Any] = {"input_ids": ids}
    both_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if both_sides:
        keywords["decoder_input_ids"] = ids
    # Heads of encoder-decoders that generate nothing (T5Gemma's) say it themselves, and pass on everything else.
    says_it = both_sides and not getattr(model, "can_generate", bool)()
    if "use_cache" in accepted or (takes_any and not says_it):
        keywords["use_cache"] = False
    return keywords


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the model makes of token ids [1, L]: logits [1, L, V], or the hidden states of a model without a head."""
    return result_of(model(**arguments(model, ids)))


def result_of(output: Any) -> torch.Tensor:
    """The tensor that matters of a model's output: its logits, else its hidden states."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else (output,)
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"the model's output has no tensor to look at: {type(output).__name__}")


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits [1, L, V]. ValueError for a model that predicts no tokens."""
    output = model(**arguments(model, ids))
    value = getattr(output, "logits", None)
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives no logits for each token; perplexity and KL divergence need a language model"
        )
    return value


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model gives next-token logits for a text."""
    try:
        with torch.no_grad():
            logits(model, torch.zeros(1, 8, dtype=torch.long))
    except ValueError:
        return False
    return True
