"""`flexq eval`: perplexity, KL divergence and multiple choice; and the comparison of `flexq quantize`."""

import argparse
from pathlib import Path
from typing import Any

from flexq.cli import options
from flexq.cli.options import UsageError
from flexq.cli.output import evaluation_table, megabytes, note, peak_memory, progress, table, where_it_ran

HELP = "Perplexity, and KL divergence to the unquantized model, on a text."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("models", nargs="+", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("--reference", metavar="MODEL", help="unquantized model (default: what a checkpoint was made from)")
    p.add_argument("--recipes", nargs="+", metavar="RECIPE", help="also quantize the reference: w8a8 paper w6a6 w6a8")
    choices_help = "instead: zero-shot multiple choice; JSON Lines of question, choices and answer"
    p.add_argument("--choices", metavar="FILE", help=choices_help)
    options.add_evaluation(p, None)
    options.add_loading(p)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import find_model, is_quantized, load_tokenizer
    from flexq.evaluate.compare import LABELS, plot, with_recipe
    from flexq.evaluate.perplexity import evaluate

    for option in ("text", "windows", "window_length") if args.choices else ():
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is of perplexity; leave it out beside --choices")
    sources = [find_model(model) for model in args.models]
    named = dict(zip(args.models, sources, strict=True))
    reference_source = _reference(args, named)
    if args.plot is not None and (reference_source is None or args.choices):
        raise UsageError("--plot compares perplexity and KL with an unquantized model's; give one, and no --choices")
    reference = load_model(reference_source, args.dtype, args.device) if reference_source is not None else None
    models = {
        name: load_model(source, args.dtype, args.device)
        for name, source in named.items()
        if reference_source is None or source.name != reference_source.name or is_quantized(source)
    }
    for recipe in args.recipes or ():
        models[LABELS.get(recipe, recipe)] = with_recipe(reference, recipe, progress(recipe, args.quiet))
    tokenizer = load_tokenizer(reference_source or sources[0])
    if args.choices:
        everyone = ({"unquantized": reference} if reference is not None else {}) | models
        return _choices(args, everyone, tokenizer)
    some_model = reference if reference is not None else next(iter(models.values()))
    windows = options.evaluation_windows(args, tokenizer, some_model)
    results = evaluate(models, windows, reference, progress("evaluating", args.quiet))
    about = options.about_windows(windows, tokenizer)
    if not args.json:
        bos = ", each beginning with BOS" if about["begins_with"] else ""
        beside = "" if reference is None else f"; reference {reference_source.name}"
        print(f"{len(windows)} windows of {about['window_length']} tokens{bos}{beside}; {where_it_ran(args.device)}:")
        print(evaluation_table(results))
        note(args, f"peak memory {megabytes(peak_memory())}")
    if args.plot:
        plot(results, args.plot)
    return {
        **about,
        "device": where_it_ran(args.device),
        "results": [r.to_dict() for r in results],
        "peak_memory_bytes": peak_memory(),
    }


def _reference(args: argparse.Namespace, named: dict[str, Any]):
    """The unquantized model that the others are compared with, if there is one."""
    from flexq.checkpoint.origin import recorded_source, why_not_source_of
    from flexq.checkpoint.source import find_model, is_quantized

    if args.reference is not None:
        return options.reference(args)
    checkpoints = [source for source in named.values() if is_quantized(source)]
    recorded = [(name, source) for source in checkpoints if (name := recorded_source(source)) is not None]
    name, checkpoint = recorded[0] if recorded else (None, None)
    if len({name for name, _ in recorded}) > 1:
        note(args, f"made from different models: all are compared with {name}; --reference names another")
    floats = [name for name, source in named.items() if not is_quantized(source)]
    if name is None and args.recipes and floats:
        name = floats[0]
    if args.recipes and name is None:
        raise UsageError("--recipes quantizes an unquantized model; give one")
    if checkpoint is not None and (why := why_not_source_of(checkpoint, name)) is not None:
        why = f"{name}, which {checkpoint.name} was made from, {why}"
        if args.recipes:
            raise UsageError(f"{why}; --recipes quantizes it: give --reference")
        note(args, f"{why}: no KL divergence; give --reference for it")
        return None
    return find_model(name) if name is not None else None


def _choices(args: argparse.Namespace, models, tokenizer) -> dict[str, Any]:
    from flexq.evaluate.zero_shot import read_questions, score

    questions = read_questions(args.choices)
    results = score(models, tokenizer, questions, progress("scoring", args.quiet))
    if not args.json:
        rows = [["model", "accuracy", "by length", "+-"]]
        rows += [
            [s.name, f"{100 * s.accuracy:.1f}%", f"{100 * s.accuracy_normalized:.1f}%", f"{100 * s.error:.1f}%"]
            for s in results
        ]
        print(f"{args.choices}, {len(questions)} questions, zero-shot:")
        print(table(rows))
    return {"choices": [s.to_dict() for s in results], "device": where_it_ran(args.device)}


def compare(args: argparse.Namespace, source, output: Path, plan, reference) -> list[dict[str, Any]]:
    """The unquantized model, the recipes, and the checkpoint just written, on the same text."""
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import find_model, load_tokenizer
    from flexq.evaluate.compare import COMPARED_RECIPES, LABELS, plot, with_recipe
    from flexq.evaluate.perplexity import evaluate
    from flexq.plan import RECIPES

    reference = reference if reference is not None else load_model(source, device=args.device)
    reference.to(args.device)
    output_source = find_model(output)
    windows = options.evaluation_windows(args, load_tokenizer(output_source), reference)
    rounded = args.calibrate is None  # to nearest, as the recipes are
    written = next((name for name, recipe in RECIPES.items() if rounded and recipe == plan), None)
    # In the reference's dtype, so that formats are compared and not the precision of what is between the layers.
    checkpoint = load_model(output_source, reference.dtype, args.device)
    models = {}
    for name in COMPARED_RECIPES:
        if name == written:
            models[LABELS[name]] = checkpoint
            continue
        try:
            models[LABELS[name]] = with_recipe(reference, name)
        except ValueError as error:
            note(args, f"{LABELS[name]} is left out: {error}")
    if written is None:
        models[str(output)] = checkpoint
    results = evaluate(models, windows, reference, progress("evaluating", args.quiet))
    if not args.json:
        text = "WikiText-2 excerpt" if args.text is None else args.text
        length = windows[0].shape[1]
        print(f"\n{source.name} on {text}, {len(windows)} windows of {length} tokens ({where_it_ran(args.device)}):")
        print(evaluation_table(results))
    if args.plot:
        plot(results, args.plot)
    return [r.to_dict() for r in results]
