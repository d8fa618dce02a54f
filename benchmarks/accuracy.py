"""The tables of docs/results/accuracy.md: recipes and plans of SmolLM2-135M, by the library's packed kernels.

python benchmarks/accuracy.py TEXT [--held-out WINDOWS] [--fast | --widths | --plans | --estimated-plans]
                              [--no-rotation] [--resume DIR]

TEXT is WikiText-2's validation text: its last windows of 2048 tokens evaluate, 16 evenly spaced others calibrate.
Instead, --fast evaluates recipes that calibrate nothing on every fourth window of all; --widths equalizes and compares
weight bits, on fewer and shorter windows; --plans measures the layers'
sensitivity and compares plans, --estimated-plans estimates it (both may be given); with --no-rotation for weights
rounded to nearest without rotation. --resume keeps the calibration's blocks in DIR.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from flexq.checkpoint.read import load_model
from flexq.checkpoint.source import find_model, load_tokenizer
from flexq.evaluate.perplexity import evaluate
from flexq.evaluate.text import spread, windows_of
from flexq.plan import Plan
from flexq.planning import choose as planning
from flexq.planning import sensitivity
from flexq.planning.mixed import BEST_ALPHA, Mixed, with_head
from flexq.quantize.calibrate import DEFAULT_WINDOWS, calibrate_model
from flexq.quantize.equalize import equalize_model
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model

BUDGETS = (0.3, 0.2, 0.1, 0.05)


def report(name, model, held_out, reference, share=None) -> None:
    result = evaluate({name: model}, held_out, reference)[1]
    extra = "" if share is None else f"  {100 * share:.0f}% of the parameters at A8"
    print(f"{name:28} {100 * result.perplexity_change:+.2f}%  KL {result.kl:.4f}{extra}", flush=True)


def recipes(reference, calibration, held_out) -> None:
    for scheme in ("group", "channel"):
        begin = time.perf_counter()
        model = calibrate_model(shared_copy(reference), calibration, Plan.uniform(scheme=scheme))
        print(f"calibrated, scheme {scheme}: {time.perf_counter() - begin:.0f} s", flush=True)
        report(f"best W6A8 {scheme}", model, held_out, reference)
        if scheme == "group":
            with sensitivity.act_bits(list(sensitivity.quantized_layers(model).values()), 6):
                report("best W6A6 group", model, held_out, reference)


def uncalibrated(reference, windows) -> None:
    for recipe in ("w6a8", "w6a6"):
        report(f"fast {recipe}", quantize_model(shared_copy(reference), recipe), windows, reference)


def widths(reference, tokenizer, text) -> None:
    """Weight bits everywhere and layer by layer, scheme channel, A8, equalized."""
    windows = windows_of(tokenizer, text, 1024)
    calibration, held_out = spread(windows[:-32], 8), spread(windows[-32:], 6)
    few = spread(windows[:-32], 4)
    probes = spread(windows_of(tokenizer, text, 512)[:-64], 10)
    plan = Plan.uniform(scheme="channel")

    def calibrated(model, plan, on=calibration):
        return calibrate_model(shared_copy(model), on, plan)

    report("6 bits, not equalized", calibrated(reference, plan), held_out, reference)
    equalized = shared_copy(reference)
    equalize_model(equalized, few, BEST_ALPHA, torch.bfloat16)
    for bits in (6, 5, 8):
        model = calibrated(equalized, Plan.uniform(scheme="channel", weight_bits=bits))
        report(f"{bits} bits", model, held_out, reference)
    mixed = Mixed.of(
        equalized, probes, with_head(equalized, plan), calibrate=lambda at_6: calibrated(equalized, at_6, few)
    )
    for bits in (6.0, 5.0, 4.5):
        model = calibrated(equalized, mixed.plan_at(mixed.at_bits(bits)))
        report(f"{bits} bits by layer, head 8", model, held_out, reference)
        model.lm_head = equalized.lm_head
        report(f"{bits} bits by layer", model, held_out, reference)


def at_random(sizes, budget) -> set[str]:
    names, left, chosen = list(sizes), budget * sum(sizes.values()), set()
    random.Random(0).shuffle(names)
    for name in names:
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen


def plans(reference, model, held_out, probes, how: str) -> None:
    begin = time.perf_counter()
    ranking = getattr(sensitivity, how)(model, reference, probes)
    print(f"{how} {len(ranking)} layers: {time.perf_counter() - begin:.0f} s", flush=True)
    layers = sensitivity.quantized_layers(model)
    sizes = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    total = sum(sizes.values())

    def compare(name, at_8) -> None:
        with (
            sensitivity.act_bits([layer for n, layer in layers.items() if n not in at_8], 6),
            sensitivity.act_bits([layer for n, layer in layers.items() if n in at_8], 8),
        ):
            report(name, model, held_out, reference, sum(sizes[n] for n in at_8) / total)

    for budget in BUDGETS:
        compare(f"{how}d, {100 * budget:.0f}%", set(planning.within_budget(ranking, budget)))
    if how == "measure":
        for budget in BUDGETS:
            compare(f"random, {100 * budget:.0f}%", at_random(sizes, budget))
        compare("by kind: down_proj", {name for name in layers if name.endswith("down_proj")})
        compare("A6 everywhere", set())
        compare("A8 everywhere", set(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", type=Path)
    parser.add_argument("--held-out", type=int, default=16, metavar="WINDOWS")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--estimated-plans", action="store_true")
    parser.add_argument("--no-rotation", action="store_true")
    parser.add_argument("--resume", metavar="DIR")
    args = parser.parse_args()
    source = find_model("smollm2-135m")
    reference, tokenizer = load_model(source), load_tokenizer(source)
    text = args.text.read_text(encoding="utf-8")
    windows = windows_of(tokenizer, text)
    held_out, others = windows[-args.held_out :], windows[: -args.held_out]
    calibration = spread(others, DEFAULT_WINDOWS)
    probes = windows_of(tokenizer, text[: len(text) // 2], 512)
    if args.plans or args.estimated_plans:
        if args.no_rotation:
            model = quantize_model(shared_copy(reference), "rtn")
        else:
            model = calibrate_model(shared_copy(reference), calibration, resume=args.resume)
        if args.plans:
            plans(reference, model, held_out, probes[-3:], "measure")
        if args.estimated_plans:
            plans(reference, model, held_out, probes[-8:], "estimate")
    elif args.widths:
        widths(reference, tokenizer, text)
    elif args.fast:
        uncalibrated(reference, windows[::4])
    else:
        recipes(reference, calibration, held_out)


if __name__ == "__main__":
    main()
