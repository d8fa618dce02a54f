"""Generating text with a loaded model."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear
from flexq.run.fuse import fuse_model

_fusing = threading.Lock()


@dataclass
class Generation:
    """What came out, and how fast.

    Args:
        text: the new text, without the prompt; of several prompts, a list.
        new_tokens: how many came, of all prompts together, up to and with the end of each text.
        first_token_seconds: from the call to the first token, which includes the prompt's prefill.
        tokens_per_second: of the tokens after the first step; 0 if there was only one.
        peak_memory_bytes: of the GPU while it ran; 0 on the CPU.
    """

    text: str | list[str]
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int = 0


def _streamer(tokenizer, on_text: Callable[[str], None] | None, times: list[float]):
    from transformers import TextStreamer
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def put(self, value):
            times.append(time.perf_counter())

        def end(self):
            pass

    class Texts(TextStreamer):
        def put(self, value):
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False):
            on_text(text)

    return Clock() if on_text is None else Texts(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _inputs(tokenizer, prompts: Sequence[str], chat: bool, device) -> Any:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template; leave --chat out")
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
    if len(prompts) > 1:
        if tokenizer.pad_token is None:
            # Masked, whatever it is.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", add_special_tokens=not chat, padding=len(prompts) > 1)
    if inputs.input_ids.shape[1] == 0 or not bool((inputs.attention_mask.sum(1) > 0).all()):
        raise ValueError("the prompt has no tokens")
    return inputs.to(device)


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int = 64,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    fuse: bool = True,
    **options,
) -> Generation:
    """Continue a prompt, or several at once (padded on the left).

    On a GPU the cache is static unless `cache_implementation` says otherwise, and transformers then compiles the decode
    step into CUDA graphs: the first call of a shape takes a minute, later ones none. `disable_compile=True` leaves
    that out.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompt: text, or a user's message with `chat`; or a list of them.
        max_new_tokens: at most, of each prompt.
        chat: put each prompt through the tokenizer's chat template.
        on_text: called with each piece of text as it comes; of one prompt only.
        fuse: first `flexq.fuse_model(model)`, if it is quantized and not fused yet.
        options: to `model.generate`, as transformers names them (do_sample, temperature, top_p, ...).
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompt was given")
    if len(prompts) > 1 and on_text is not None:
        raise ValueError("text is streamed for one prompt at a time; leave on_text out")
    device = next(model.parameters()).device
    inputs = _inputs(tokenizer, prompts, chat, device)
    if fuse:
        with _fusing:  # threads may come here with one model
            unfused = getattr(model, "flexq_fusion", None) is None
            if unfused and any(isinstance(m, Linear) for m in model.modules()):
                fuse_model(model)
    options.setdefault("do_sample", False)
    if device.type == "cuda":
        options.setdefault("cache_implementation", "static")
        torch.cuda.reset_peak_memory_stats(device)
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    times: list[float] = []
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=_streamer(tokenizer, on_text, times),
            pad_token_id=end,
            **options,
        )
    new = output[:, inputs.input_ids.shape[1] :]
    counts = [_length(row, model.generation_config.eos_token_id) for row in new.tolist()]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    arrivals = times[1:]  # the first is the prompt itself
    span = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else 0.0
    return Generation(
        texts[0] if isinstance(prompt, str) else texts,
        sum(counts),
        arrivals[0] - begin if arrivals else 0.0,
        sum(max(count - 1, 0) for count in counts) / span if span > 0 else 0.0,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def _length(tokens: list[int], end: int | list[int] | None) -> int:
    """Tokens up to and with the first that ends a text."""
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
