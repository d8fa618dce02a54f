"""`flexq quantize`: a model into a folder that transformers and vLLM load."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from flexq.cli import calibrated, options
from flexq.cli.evaluate import compare
from flexq.cli.generate import generate_text
from flexq.cli.options import UsageError, mean_bits, positive, positive_float, share
from flexq.cli.output import megabytes, note, peak_gpu_memory, peak_memory, progress, where_it_ran

_WINDOWS = 16  # of calibration
HELP = "Quantize a model into a folder that transformers loads after `import flexq`."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("-o", "--output", metavar="DIR", help="new folder (default: the model's name + '-flexq')")
    p.add_argument("--plan", metavar="PLAN", help="w6a8 (default; also fast), w6a6, rtn, paper, best, or a JSON file")
    p.add_argument("--act-bits", type=int, choices=(6, 8), help="activation bits of every layer")
    p.add_argument("--weight-bits", type=int, choices=(4, 5, 6, 8), help="weight bits of every layer")
    p.add_argument("--scheme", choices=("group", "channel"), help="scales per group of 128, or per row and token")
    p.add_argument("--rotation", choices=("none", "hadamard128"), help="of each group of 128")
    dtype_help = "of what is not quantized (default: the model's; bfloat16 for a .gguf file)"
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=dtype_help)
    calibrate_help = "round with a text in view (recipe best); without a file, the shipped excerpt of WikiText-2"
    p.add_argument("--calibrate", nargs="?", const="", metavar="TEXT", help=calibrate_help)
    p.add_argument("--calibration-windows", type=positive, metavar="N", help=f"of it (default: {_WINDOWS})")
    bits = p.add_mutually_exclusive_group()
    bits.add_argument("--budget", type=share, metavar="SHARE", help="A8 for this share of the parameters, else A6")
    bits.add_argument("--target-kl", type=positive_float, metavar="KL", help="A8 where it takes to reach this KL")
    bits.add_argument("--target-ppl", type=positive_float, metavar="PPL", help="the same for this perplexity")
    bits.add_argument("--bits", type=mean_bits, metavar="B", help="weight bits by layer, B in the mean (LM head aside)")
    bits.add_argument("--size", type=positive_float, metavar="GB", help="the same for a checkpoint of at most GB")
    p.add_argument(
        "--weights", action="store_true", help="--target-kl chooses weight bits instead of activations' bits"
    )
    p.add_argument("--equalize", type=share, metavar="ALPHA", help="scale inputs channel by channel first (best: 0.25)")
    head_help = "weight bits of the LM head, or 'float' (best: 8)"
    p.add_argument("--head-bits", choices=("4", "5", "6", "8", "float"), help=head_help)
    embeddings_help = "bits of the token embedding, and of an LM head that is tied to it (default: left as it is)"
    p.add_argument("--embeddings", type=int, choices=(8,), help=embeddings_help)
    p.add_argument("--estimate", action="store_true", help="rank layers for these by an estimate, not by measuring")
    of_help = "what --budget, --bits and --weights --target-kl count (default: parameters); time is measured"
    p.add_argument("--budget-of", choices=("parameters", "time"), default="parameters", help=of_help)
    where_help = "A6 only where it is measured to be faster (default), or for devices where it is"
    p.add_argument("--a6", choices=("where-faster", "anywhere"), default="where-faster", help=where_help)
    cost_help = "where that is measured (default: a GPU if there is one)"
    p.add_argument("--cost-device", choices=("cpu", "cuda"), help=cost_help)
    p.add_argument("--cost-tokens", type=positive, default=16, metavar="M", help="and with how many (default: 16)")
    p.add_argument("--no-token-weights", action="store_true", help="calibrate without a backward pass, see the docs")
    options.add_device(p, "where it calibrates and compares")
    p.add_argument("--resume", metavar="DIR", help="keep the calibration's finished blocks there, and go on from them")
    low_help = "calibrate from files, a block in memory at a time (default: where memory does not hold the model)"
    p.add_argument("--low-memory", action="store_true", help=low_help)
    folder_help = "the same, with hidden states in files of this folder, not in memory"
    p.add_argument("--offload-folder", metavar="DIR", help=folder_help)
    p.add_argument("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    p.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these layers; may be repeated")
    p.add_argument("--shard-size", type=positive_float, default=2.0, metavar="GB", help="of a file (default: 2)")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it is a FlexQ checkpoint")
    p.add_argument("--compare", action="store_true", help="then evaluate it beside the unquantized model and recipes")
    options.add_evaluation(p, 2)
    p.add_argument("--generate", metavar="PROMPT", help="then continue this prompt with the quantized model")
    p.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="of --generate (default: 48)")


def _plan(args: argparse.Namespace):
    """--plan, or the plan that --act-bits, --weight-bits, --scheme and --rotation make; with --embeddings."""
    plan = _plan_of_layers(args)
    return plan if args.embeddings is None else dataclasses.replace(plan, embeddings=args.embeddings)


def _plan_of_layers(args: argparse.Namespace):
    from flexq.plan import DEFAULT_RECIPE, Plan

    settings = {name: getattr(args, name) for name in ("act_bits", "weight_bits", "scheme", "rotation")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.best:
        return Plan.uniform(**({"scheme": "channel"} | settings))
    if args.plan is not None and settings:
        raise UsageError(f"{_flag(next(iter(settings)))} and --plan exclude each other; edit the plan instead")
    return Plan.uniform(**settings) if settings else Plan.of(args.plan or DEFAULT_RECIPE)


def _flag(option: str) -> str:
    """As it stands on the command line."""
    return "--" + option.replace("_", "-")


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together, and says in `args.best` whether the recipe best is meant, in
    `args.measures_whole` which options need all of the model in memory."""
    chosen = ("budget", "target_kl", "target_ppl", "bits", "size")
    if args.output == "":
        raise UsageError("--output names a new folder, got ''")
    for option in () if args.compare else ("text", "plot"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option} is for --compare; ask for it, or leave it out")
    if args.calibrate is None:
        if args.plan == "best":
            raise UsageError("recipe best rounds with a text in view: give one with --calibrate")
        for option in (*chosen, "equalize", "head_bits"):
            if getattr(args, option) is not None:
                raise UsageError(f"{_flag(option)} looks at a text: give one with --calibrate")
        for option in ("resume", "calibration_windows"):
            if getattr(args, option) is not None:
                raise UsageError(f"{_flag(option)} is of calibration: ask for it with --calibrate")
        if args.window_length is not None and not args.compare:
            raise UsageError("--window-length is for --compare and --calibrate; give one of them")
        for option in ("low_memory", "offload_folder"):
            if getattr(args, option):
                raise UsageError(f"{_flag(option)} is of calibration; plain rounding takes little memory")
    if args.resume is not None:
        if args.resume == "":
            raise UsageError("--resume names a folder, got ''")
        from flexq.quantize.finished import require_own

        require_own(Path(args.resume))
    args.calibration_windows = args.calibration_windows or _WINDOWS
    args.low_memory = args.low_memory or args.offload_folder is not None
    asked = [getattr(args, option) is not None for option in chosen] + [args.compare]
    args.measures_whole = [_flag(o) for o, is_asked in zip((*chosen, "compare"), asked, strict=True) if is_asked]
    if args.low_memory and args.measures_whole:
        raise UsageError(f"{args.measures_whole[0]} measures the whole model, which --low-memory never holds")
    if args.weights and args.target_kl is None:
        raise UsageError("--weights says what --target-kl chooses; without one there is nothing to choose")
    of_weights = args.bits is not None or args.size is not None or args.weights
    if of_weights and args.weight_bits is not None:
        raise UsageError("--weight-bits gives every layer the same; leave it out where they are to be chosen")
    chooses_activations = args.budget is not None or (not args.weights and (args.target_kl or args.target_ppl))
    if chooses_activations and args.act_bits is not None:
        raise UsageError("--act-bits gives every layer the same; leave it out where they are to be chosen")
    if args.budget_of == "time" and args.budget is None and args.bits is None and not args.weights:
        raise UsageError("--budget-of time is for --budget, --bits and --weights --target-kl; give one of them")
    # --calibrate alone is best too; other settings and activations' bits are not.
    of_activations = not of_weights and any(getattr(args, option) is not None for option in chosen)
    given = [args.plan, args.act_bits, args.weight_bits, args.scheme, args.rotation]
    plain = all(value is None for value in given) and not of_activations
    args.best = args.calibrate is not None and (args.plan == "best" or plain)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint.convert import Conversion, convert
    from flexq.checkpoint.folder import require_free
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import float_model, load_tokenizer

    begin = time.perf_counter()
    _check(args)
    plan, source = _plan(args), float_model(args.model)
    if args.compare or args.generate is not None:
        load_tokenizer(source)  # what they need, before the long work
    name = source.name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    output = Path(args.output or f"{name}-flexq")
    require_free(output, args.overwrite, source.folder)
    from_files = args.calibrate is not None and calibrated.is_from_files(args, source)
    # What is loaded whole anyway serves as the reference of the comparison too.
    whole = (args.calibrate is not None and not from_files) or (args.compare and source.folder is None)
    reference = load_model(source) if whole else None
    done: Conversion
    if from_files:
        done = calibrated.quantize_from_files(args, source, output, plan)
    elif args.calibrate is not None:
        calibrated.place(reference, args.device)
        done = calibrated.quantize(args, source, output, plan, reference)
    else:
        done = convert(
            source,
            output,
            plan,
            args.include,
            args.skip,
            int(args.shard_size * 1e9),
            args.overwrite,
            progress("quantizing", args.quiet),
            reference,
            options.stored_dtype(args),
        )
    result = _report(args, source, output, done, time.perf_counter() - begin)
    if args.compare:
        result["comparison"] = compare(args, source, output, plan, reference)
    if args.generate is not None:
        result["generation"] = generate_text(args, str(output), [args.generate], args.max_new_tokens)
    return result


def _report(args: argparse.Namespace, source, output: Path, done, seconds: float) -> dict[str, Any]:
    from flexq.quantize.layers import some

    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    layers = [c for c in done.plan.layers.values() if c is not None]
    kept = len(done.plan.layers) - len(layers)
    where = where_it_ran(args.device) if args.calibrate is not None else "CPU"
    of_gpu = peak_gpu_memory(args.device) if args.calibrate is not None else 0
    peaks = megabytes(peak_memory()) + (f", of the GPU {megabytes(of_gpu)}" if of_gpu else "")
    note(
        args,
        f"{source.name}: {len(layers)} layers quantized, {kept} left, in {seconds:.1f} s ({where}), peak memory "
        f"{peaks}\n{done.coverage.sentence()}\n{output}: {megabytes(size)} ({done.sizes})",
    )
    if done.coverage.warning:
        note(args, "warning: " + done.coverage.warning)
    vanished = done.plan.produced_by.get("vanished_scales")
    if vanished:
        note(args, f"{vanished} groups of weights are too small for float16 scales and were stored as zeros")
    beside, left_out = [name for _, name in done.placeless.beside], done.placeless.left_out
    if left_out:
        note(args, f"left out, as the model's class has no place for them: {some(left_out)}")
    if beside:
        note(args, f"copied in floating point, as the model's class ignores them: {some(beside)}")
    return {
        "output": str(output),
        "layers": len(layers),
        "left": kept,
        "coverage": done.coverage.to_dict(),
        "bytes": size,
        "bytes_by_part": vars(done.sizes),
        "left_out": left_out,
        "copied": beside,
        "vanished_scales": vanished or 0,
        "seconds": seconds,
        "device": where,
        "peak_memory_bytes": peak_memory(),
        "peak_gpu_memory_bytes": of_gpu,
    }
