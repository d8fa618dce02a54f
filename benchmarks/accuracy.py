"""The tables of docs/results/accuracy.md: recipes and plans of SmolLM2-135M, by the library's packed kernels.

python benchmarks/accuracy.py TEXT [--held-out WINDOWS] [--windows WINDOWS] [--equalize ALPHA] [--no-rotation]
                              [--resume DIR] [--device DEVICE]
                              [--fast | --widths [--short] | --width-plans [--calibrated] | --plans | --estimated-plans]

TEXT is WikiText-2's validation text: its last windows of 2048 tokens evaluate, 16 evenly spaced others calibrate.
Recipes are of scheme and activations alone, of inputs equalized if asked for, the LM head in floating point.
Instead, --fast evaluates recipes that calibrate nothing on every fourth window of all; --widths equalizes and compares
weight bits, on fewer and shorter windows if --short; --width-plans compares plans of weight bits, on those, with random
ones and with a rule of thumb, of weights rounded to nearest or --calibrated; --plans measures the layers' sensitivity
to activation bits and compares plans, --estimated-plans estimates it (both may be given); with --no-rotation for
weights rounded to nearest without rotation. --resume keeps the calibration's blocks in DIR.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from flexq.checkpoint.read import load_model
from flexq.checkpoint.source import find_model, load_tokenizer
from flexq.evaluate.perplexity import evaluate
from flexq.evaluate.text import spread, windows_of
from flexq.ops import WEIGHT_BITS
from flexq.plan import Plan
from flexq.planning import choose as planning
from flexq.planning import sensitivity
from flexq.planning.mixed import BEST_ALPHA, Mixed, with_head
from flexq.planning.widths import mean_bits, rounded_models
from flexq.quantize.calibrate import DEFAULT_WINDOWS, calibrate_model
from flexq.quantize.equalize import equalize_model
from flexq.quantize.layers import replace_module, shared_copy
from flexq.quantize.model import quantize_model

BUDGETS = (0.3, 0.2, 0.1, 0.05)
MEAN_BITS = (4.5, 5.0, 6.0)
RANDOM_PLANS = 5


def report(name, model, held_out, reference, share=None) -> None:
    result = evaluate({name: model}, held_out, reference)[1]
    extra = "" if share is None else f"  {100 * share:.0f}% of the parameters at A8"
    print(f"{name:28} {100 * result.perplexity_change:+.2f}%  KL {result.kl:.4f}{extra}", flush=True)


def equalized(reference, windows, alpha=BEST_ALPHA, carrier=None):
    model = shared_copy(reference)
    equalize_model(model, windows, alpha, carrier)
    return model


def recipes(reference, calibration, held_out, alpha) -> None:
    floats = equalized(reference, spread(calibration, 4), alpha, torch.bfloat16) if alpha > 0 else reference
    for scheme in ("channel", "group"):
        begin = time.perf_counter()
        model = calibrate_model(shared_copy(floats), calibration, Plan.uniform(scheme=scheme))
        print(f"calibrated, scheme {scheme}: {time.perf_counter() - begin:.0f} s", flush=True)
        report(f"W6A8 {scheme}", model, held_out, reference)
        if scheme == "group":
            with sensitivity.act_bits(list(sensitivity.quantized_layers(model).values()), 6):
                report("W6A6 group", model, held_out, reference)


def uncalibrated(reference, windows) -> None:
    for recipe in ("w6a8", "w6a6"):
        report(f"fast {recipe}", quantize_model(shared_copy(reference), recipe), windows, reference)


def probes_of(tokenizer, text, held_out):
    """To estimate widths: apart from the last `held_out` windows of 2048 tokens, which evaluate."""
    return spread(windows_of(tokenizer, text, 512)[: -4 * held_out], 10)


def short_windows(tokenizer, text):
    """To calibrate and to evaluate."""
    windows = windows_of(tokenizer, text, 1024)
    return spread(windows[:-32], 8), spread(windows[-32:], 6)


def widths(reference, calibration, held_out, probes) -> None:
    """Weight bits everywhere and layer by layer, scheme channel, A8, equalized."""
    few = calibration[::2]
    plan = Plan.uniform(scheme="channel")

    def calibrated(model, plan, on=calibration):
        return calibrate_model(shared_copy(model), on, plan)

    report("6 bits, not equalized", calibrated(reference, plan), held_out, reference)
    floats = equalized(reference, few, carrier=torch.bfloat16)
    for bits in (6, 5, 8):
        model = calibrated(floats, Plan.uniform(scheme="channel", weight_bits=bits))
        report(f"{bits} bits", model, held_out, reference)
    mixed = Mixed.of(floats, probes, with_head(floats, plan), calibrate=lambda at_6: calibrated(floats, at_6, few))
    for bits in (6.0, 5.0, 4.5):
        model = calibrated(floats, mixed.plan_at(mixed.at_bits(bits)))
        report(f"{bits} bits by layer, head 8", model, held_out, reference)
        model.lm_head = floats.lm_head
        report(f"{bits} bits by layer", model, held_out, reference)


def width_plans(reference, calibration, held_out, probes, calibrated: bool) -> None:
    """Plans of weight bits by the estimate, at random and by a rule of thumb, of the same size each.

    A plan's model is put together of layers of a model of each width: for weights rounded to nearest that is what
    quantizing with the plan gives, for calibrated ones nearly so.
    """
    floats, plan = reference, Plan.uniform(scheme="channel")
    if calibrated:
        floats = equalized(reference, calibration[::2])
        of_width = {bits: Plan.uniform(scheme="channel", weight_bits=bits) for bits in WEIGHT_BITS}
        models = {bits: calibrate_model(shared_copy(floats), calibration, p) for bits, p in of_width.items()}
    else:
        models = rounded_models(floats, plan)
    mixed = Mixed.of(floats, probes, plan, calibrate=(lambda _: models[6]) if calibrated else None)
    divergence = sensitivity.Divergence(reference, held_out)

    def kl(bits: Mapping[str, int]) -> float:
        model = shared_copy(models[6])
        for name, width in bits.items():
            replace_module(model, name, models[width].get_submodule(name))
        return divergence.mean(model)

    def row(name: str, plans: Sequence[Mapping[str, int]]) -> None:
        each = [kl(bits) for bits in plans]
        spread_of = "" if len(each) == 1 else f", {min(each):.4f} to {max(each):.4f} of {len(each)}"
        size = statistics.mean(mean_bits(mixed.ranking, bits) for bits in plans)
        print(f"{name:32} {size:.3f} bits  KL {statistics.mean(each):.4f}{spread_of}", flush=True)

    for bits in WEIGHT_BITS:
        row(f"{bits} bits everywhere", [{layer.name: bits for layer in mixed.ranking}])
    for bits in MEAN_BITS:
        row(f"{bits} measured", [mixed.at_bits(bits).bits])
        row(f"{bits} down_proj and v_proj more", [more_for(mixed, ("down_proj", "v_proj"), bits)])
        row(f"{bits} at random", [random_widths(mixed, bits, seed) for seed in range(RANDOM_PLANS)])


def random_widths(mixed: Mixed, bits: float, seed: int) -> dict[str, int]:
    """Layers that are merged have one width, as in the plans of `Mixed`."""
    draw = random.Random(seed)
    return raised(mixed, (draw.choice(mixed.groups) for _ in range(100 * len(mixed.groups))), min(WEIGHT_BITS), bits)


def more_for(mixed: Mixed, kinds: tuple[str, ...], bits: float) -> dict[str, int]:
    """The widest width below `bits` everywhere; what is left goes to layers of these kinds, a step each in turn, and
    then to others."""
    names = [layer.name for layer in mixed.ranking]
    favored = [[name] for name in names if name.endswith(kinds)]
    others = [[name] for name in names if not name.endswith(kinds)]
    base = max(width for width in WEIGHT_BITS if width < bits)
    return raised(mixed, [*favored * len(WEIGHT_BITS), *others], base, bits)


def raised(mixed: Mixed, groups: Iterator[list[str]] | list[list[str]], base: int, bits: float) -> dict[str, int]:
    """From one width everywhere, groups of layers one step wider in turn as long as the mean stays within `bits`."""
    sizes = {layer.name: layer.parameters for layer in mixed.ranking}
    chosen, left = dict.fromkeys(sizes, base), (bits - base) * sum(sizes.values())
    for group in groups:
        wider = min((width for width in WEIGHT_BITS if width > chosen[group[0]]), default=None)
        if wider is None:
            continue
        price = sum((wider - chosen[name]) * sizes[name] for name in group)
        if price <= left:
            chosen |= dict.fromkeys(group, wider)
            left -= price
    return chosen


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
    parser.add_argument("--windows", type=int, default=DEFAULT_WINDOWS)
    parser.add_argument("--equalize", type=float, default=0.0, metavar="ALPHA")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--width-plans", action="store_true")
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--estimated-plans", action="store_true")
    parser.add_argument("--no-rotation", action="store_true")
    parser.add_argument("--resume", metavar="DIR")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.short and not args.widths:
        parser.error("--short goes with --widths")
    source = find_model("smollm2-135m")
    reference, tokenizer = load_model(source).to(args.device), load_tokenizer(source)
    text = args.text.read_text(encoding="utf-8")
    windows = windows_of(tokenizer, text)
    held_out, others = windows[-args.held_out :], windows[: -args.held_out]
    calibration = spread(others, args.windows)
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
        on = short_windows(tokenizer, text) if args.short else (calibration, held_out)
        widths(reference, *on, probes_of(tokenizer, text, args.held_out))
    elif args.width_plans:
        probes = probes_of(tokenizer, text, args.held_out)
        width_plans(reference, *short_windows(tokenizer, text), probes, args.calibrated)
    elif args.fast:
        uncalibrated(reference, windows[::4])
    else:
        recipes(reference, calibration, held_out, args.equalize)


if __name__ == "__main__":
    main()
