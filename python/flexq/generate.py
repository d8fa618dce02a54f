"""Generating text with a loaded model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Generation:
    """What came out, and how fast.

    Args:
        text: the new text, without the prompt.
        new_tokens: its length.
        first_token_seconds: from the call to the first token, which includes the prompt's prefill.
        tokens_per_second: of the tokens after the first; 0 if there was only one.
    """

    text: str
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    **options,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: text, or a user's message with `chat`.
        max_new_tokens: at most.
        chat: put the prompt through the tokenizer's chat template.
        on_text: called with each piece of text as it comes.
        options: to `model.generate`, as transformers names them (do_sample, temperature, top_p, ...).
    """
    from transformers import TextStreamer

    times: list[float] = []

    class Streamer(TextStreamer):
        def put(self, value):
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False):
            if on_text is not None:
                on_text(text)

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template; leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    options.setdefault("do_sample", False)
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    new = output[0, inputs.input_ids.shape[1] :]
    arrivals = times[1:]  # the first is the prompt itself
    span = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else 0.0
    return Generation(
        tokenizer.decode(new, skip_special_tokens=True),
        len(new),
        arrivals[0] - begin if arrivals else 0.0,
        (len(arrivals) - 1) / span if span > 0 else 0.0,
    )
