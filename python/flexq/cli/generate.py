"""`flexq generate`: continue prompts."""

import argparse
import functools
import sys
from typing import Any

from flexq.cli import options
from flexq.cli.options import positive, positive_float, share
from flexq.cli.output import where_it_ran

HELP = "Continue prompts."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("prompt", nargs="+", metavar="PROMPT", help="text, or - to read it from standard input")
    p.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    p.add_argument("--temperature", type=positive_float, metavar="T", help="sample; without it, greedy")
    p.add_argument("--top-p", type=share, metavar="P", help="sample from the likeliest that sum to P")
    p.add_argument("--top-k", type=positive, metavar="K", help="sample from the K likeliest")
    p.add_argument("--seed", type=int, help="of the sampling")
    p.add_argument("--repetition-penalty", type=positive_float, metavar="P", help="above 1: repeat less")
    cache_help = "as transformers names it: dynamic, static, offloaded, ... (default: dynamic, on a GPU static)"
    p.add_argument("--cache", metavar="KIND", help=cache_help)
    p.add_argument("--no-compile", action="store_true", help="do not compile the decode step on a GPU")
    p.add_argument("--no-fuse", action="store_true", help="do not fuse layers")
    options.add_loading(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    settings: dict[str, Any] = {"fuse": not args.no_fuse}
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    for name in ("temperature", "top_p", "top_k"):
        if getattr(args, name) is not None:
            settings |= {name: getattr(args, name), "do_sample": True}
    if args.repetition_penalty is not None:
        settings["repetition_penalty"] = args.repetition_penalty
    if args.cache is not None:
        settings["cache_implementation"] = args.cache
    if args.no_compile:
        settings["disable_compile"] = True
    return generate_text(args, args.model, prompts, args.max_new_tokens, args.dtype, args.chat, **settings)


def generate_text(
    args: argparse.Namespace,
    model: str,
    prompts: list[str],
    max_new_tokens: int,
    dtype: str = "auto",
    chat: bool = False,
    **settings,
) -> dict[str, Any]:
    """Continue prompts and print what comes."""
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import find_model, load_tokenizer
    from flexq.evaluate.text import Limits
    from flexq.run.generate import generate

    source = find_model(model)
    loaded = load_model(source, dtype, args.device)
    positions = Limits.of(loaded).positions
    if positions is not None and max_new_tokens > positions:
        print(f"note: {max_new_tokens} new tokens are more than the model's {positions} positions", file=sys.stderr)
    one, show = len(prompts) == 1, None
    if one and not args.json:
        print(f"\n{prompts[0]}", end="", flush=True)
        show = functools.partial(print, end="", flush=True)
    prompt = prompts[0] if one else prompts
    out = generate(loaded, load_tokenizer(source), prompt, max_new_tokens, chat, show, **settings)
    if not args.json:
        if not one:
            print("\n\n".join(f"{p}{text}" for p, text in zip(prompts, out.text, strict=True)))
        memory = f", {out.peak_memory_bytes / 1e9:.2f} GB of GPU memory" if out.peak_memory_bytes else ""
        print(
            f"\n\n[{out.new_tokens} tokens, the first after {out.first_token_seconds:.2f} s, then "
            f"{out.tokens_per_second:.1f} tokens/s{memory}; {where_it_ran(args.device)}]"
        )
    return {"prompt": prompt, **vars(out), "device": where_it_ran(args.device)}
