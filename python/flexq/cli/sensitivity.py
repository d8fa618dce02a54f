"""`flexq sensitivity`: what 6-bit activations, or fewer weight bits, cost, layer by layer."""

import argparse
from typing import Any

from flexq.cli import options
from flexq.cli.options import UsageError, positive
from flexq.cli.output import note, progress, table, where_it_ran

HELP = "What 6-bit instead of 8-bit activations, or each width of the weights, cost, layer by layer."
_SHOWN = 20
_BUDGETS = (0.05, 0.1, 0.2, 0.3)
_MEAN_BITS = (4.5, 5.0, 5.5, 6.0, 7.0)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("--reference", metavar="MODEL", help="unquantized model (default: what a checkpoint was made from)")
    p.add_argument("-o", "--output", metavar="JSON", help="write the ranking there")
    weights_help = "weight bits instead: 4, 5, 6 and 8 of every layer, estimated in one pass"
    p.add_argument("--weights", action="store_true", help=weights_help)
    p.add_argument("--scheme", choices=("group", "channel"), help="of --weights (default: channel)")
    estimate_help = "one backward pass for all layers, instead of measuring each"
    p.add_argument("--estimate", action="store_true", help=estimate_help)
    p.add_argument("--agreement", metavar="JSON", help="say how far an earlier ranking agrees")
    p.add_argument("--all", action="store_true", help="print every layer, not just the first 20")
    p.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: an excerpt of WikiText-2)")
    p.add_argument("--window-length", type=positive, metavar="N", help="tokens, BOS included (default: 512)")
    p.add_argument("--windows", type=positive, default=4, metavar="N", help="from the text's end (default: 4)")
    p.add_argument("--plot", metavar="PNG", help="also draw heat map and curve (needs matplotlib)")
    options.add_loading(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import find_model, is_quantized, load_tokenizer
    from flexq.evaluate.text import Limits, read_text, windows_of
    from flexq.planning import sensitivity
    from flexq.quantize.layers import shared_copy
    from flexq.quantize.model import quantize_model

    if args.output is not None:
        options.require_writable("--output", args.output)
    if args.scheme is not None and not args.weights:
        raise UsageError("--scheme is for --weights; a model's own scheme is measured else")
    source = find_model(args.model)
    if args.weights and is_quantized(source):
        raise UsageError("--weights looks at a model in floating point; give the one that this was made from")
    reference_source = source
    if args.reference is not None and not is_quantized(source):
        raise UsageError(f"--reference is for a quantized MODEL; {source.name} is in floating point")
    if is_quantized(source):
        reference_source = options.reference(args) if args.reference is not None else _made_from(source)
    if args.weights and args.agreement:
        raise UsageError("--agreement compares rankings of activations' bits, not those of --weights")
    earlier = sensitivity.FILE.load(args.agreement) if args.agreement else None  # before the long work
    reference = load_model(reference_source, args.dtype, args.device)
    tokenizer = load_tokenizer(reference_source)
    length = args.window_length or min(512, Limits.of(reference).positions or 512)
    windows = windows_of(tokenizer, read_text(args.text), length, model=reference)[-args.windows :]
    if args.weights:
        return _weights(args, source, reference, windows, tokenizer)
    quantized = load_model(source, args.dtype, args.device) if is_quantized(source) else None
    model = quantized or quantize_model(shared_copy(reference), progress=progress("quantizing", args.quiet))
    bar = progress("measuring layers", args.quiet)
    about = {"model": source.name, **options.about_windows(windows, tokenizer)}
    about |= {"kind": "estimated" if args.estimate else "measured", "device": where_it_ran(args.device)}
    if args.estimate:
        ranking = sensitivity.estimate(model, reference, windows, progress=bar)
    else:
        ranking = sensitivity.measure(model, reference, windows, bar)
    if earlier is not None:
        about["rank_agreement"] = sensitivity.rank_agreement(ranking, earlier)
        note(args, f"rank agreement with {args.agreement}: {about['rank_agreement']:.3f} (Spearman, 1 is the same)")
    if not args.json:
        _print(args, ranking, about)
    if args.output:
        sensitivity.FILE.save(ranking, args.output, **about)
    if args.plot:
        sensitivity.plot(ranking, args.plot, title=f"{source.name}, {about['kind']}, {len(windows)} windows")
    return {**about, "layers": [vars(layer) for layer in ranking]}


def _made_from(checkpoint):
    """The model that a checkpoint was made from."""
    from flexq.checkpoint.origin import recorded_source, why_not_source_of
    from flexq.checkpoint.source import find_model

    name = recorded_source(checkpoint)
    if name is None:
        raise UsageError("this checkpoint does not say what it was made from; give --reference")
    if (why := why_not_source_of(checkpoint, name)) is not None:
        raise UsageError(f"{name}, which {checkpoint.name} was made from, {why}; give --reference")
    return find_model(name)


def _print(args: argparse.Namespace, ranking, about: dict[str, Any]) -> None:
    from flexq.planning import sensitivity

    shown = ranking if args.all else ranking[:_SHOWN]
    rows = [["layer", "parameters", "KL added by A6", "+-", "KL / million"]]
    for layer in shown:
        per_million = f"{1e6 * layer.density:.2e}"
        rows.append([layer.name, f"{layer.parameters:,}", f"{layer.kl:.2e}", f"{layer.spread:.0e}", per_million])
    print(f"{about['model']}, {about['kind']} on {about['windows']} windows ({about['device']}); KL in nats a token")
    print(table(rows))
    if len(shown) < len(ranking):
        print(f"... and {len(ranking) - len(shown)} more (--all)")
    points = sensitivity.curve(ranking)
    for budget in _BUDGETS:
        left = min(kl for part, kl in points if part <= budget)
        print(f"{100 * budget:3.0f}% of the parameters at A8: {100 * left / points[0][1]:.0f}% of the added KL left")


def _weights(args: argparse.Namespace, source, reference, windows, tokenizer) -> dict[str, Any]:
    """What each width costs each layer, and the best widths for a few mean numbers of bits."""
    from flexq.plan import Plan
    from flexq.planning import width_plots, widths
    from flexq.planning.mixed import Mixed

    scheme = args.scheme or "channel"
    plan = Plan.uniform(scheme=scheme)
    mixed = Mixed.of(reference, windows, plan, progress=progress("estimating", args.quiet), device=args.device)
    about = {"model": source.name, **options.about_windows(windows, tokenizer), "scheme": scheme}
    about |= {"kind": "estimated, rounded to nearest", "device": where_it_ran(args.device)}
    points = [{"bits": bits, "kl": mixed.at_bits(bits).kl} for bits in _MEAN_BITS]
    if not args.json:
        ranking = sorted(mixed.ranking, key=lambda layer: -layer.kl[6] / layer.parameters)
        shown = ranking if args.all else ranking[:_SHOWN]
        rows = [["layer", "parameters", *(f"KL at {bits} bits" for bits in widths.WEIGHT_BITS), "+- (6)"]]
        for layer in shown:
            kl = [f"{layer.kl[bits]:.2e}" for bits in widths.WEIGHT_BITS]
            rows.append([layer.name, f"{layer.parameters:,}", *kl, f"{layer.spread[6]:.0e}"])
        print(
            f"{about['model']}, {about['kind']} on {about['windows']} windows ({about['device']}); KL in nats a token"
        )
        print(table(rows))
        if len(shown) < len(ranking):
            print(f"... and {len(ranking) - len(shown)} more (--all)")
        uniform = {bits: sum(layer.kl[bits] for layer in ranking) for bits in widths.WEIGHT_BITS}
        print("all layers at " + ", ".join(f"{bits} bits: KL {kl:.4f}" for bits, kl in uniform.items()))
        print("bits by layer: " + ", ".join(f"{p['bits']:g} in the mean: {p['kl']:.4f}" for p in points))
    if args.output:
        widths.FILE.save(mixed.ranking, args.output, **about)
    if args.plot:
        width_plots.plot(mixed.ranking, mixed.groups, args.plot, title=f"{source.name}, {len(windows)} windows")
    return {**about, "frontier": points, "layers": [vars(layer) for layer in mixed.ranking]}
