"""What `flexq quantize --calibrate` does: equalize, choose widths or activations' bits, round with a text in view."""

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexq.cli import options
from flexq.cli.options import UsageError
from flexq.cli.output import available_memory, note, progress

# Tokens a window, and windows, on which layers are measured: long enough to rank them, short enough for every layer.
_PROBE_LENGTH, _PROBE_WINDOWS = 512, 4
# And on which the estimate for weight bits is made, which costs one pass for all layers.
_ESTIMATE_WINDOWS = 8
# Of the calibration's windows, on which inputs' channels are measured, and by which the estimate is calibrated.
_FEW_WINDOWS = 4
# Of the unquantized weights' bytes: themselves, quantized ones, and what is computed beside them.
_CALIBRATION_MEMORY = 2.0


def place(model, device: str) -> None:
    """A model onto a GPU if it fits there with what calibration takes; else its blocks go there one at a time."""
    import torch

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == "cpu" or torch.cuda.mem_get_info(device)[0] > _CALIBRATION_MEMORY * size:
        model.to(device)


def is_from_files(args: argparse.Namespace, source) -> bool:
    """Whether weights are to be read a block at a time: as asked, or where memory does not hold what calibration takes
    and nothing that is asked for needs all of the model."""
    if _processes() > 1 and args.measures_whole:
        raise UsageError(f"{args.measures_whole[0]} measures the whole model, which several processes never hold")
    if args.low_memory or _processes() > 1 or source.folder is None or args.measures_whole:
        return args.low_memory or _processes() > 1
    size = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    return available_memory() < _CALIBRATION_MEMORY * size


def _processes() -> int:
    """How many torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def _group(args: argparse.Namespace) -> Iterator[Any]:
    """The processes that torchrun has started, each on a GPU of its own; the first one alone prints."""
    from torch import cuda, distributed

    from flexq.quantize.group import Group

    if _processes() == 1:
        yield Group()
        return
    # Default arguments there are the group that exists when it is imported; from then on that group outlives us.
    importlib.import_module("torch.distributed.nn.functional")
    on_gpu = args.device != "cpu"
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        cuda.set_device(args.device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        group = Group(distributed.group.WORLD)
        if group.rank > 0:
            args.quiet, args.json = True, False
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        yield group
    finally:
        distributed.destroy_process_group()


def quantize_from_files(args: argparse.Namespace, source, output: Path, plan):
    """`quantize` with a block in memory at a time, by all processes that torchrun has started."""
    with _group(args) as group:
        return _quantize_from_files(args, source, output, plan, group)


def _quantize_from_files(args: argparse.Namespace, source, output: Path, plan, group):
    from flexq.checkpoint.calibrate import calibrate_offloaded, weights_where_they_are_read
    from flexq.checkpoint.offloaded import open_offloaded
    from flexq.checkpoint.source import load_tokenizer
    from flexq.evaluate.text import read_text, windows_of

    folder = None if args.offload_folder is None else Path(args.offload_folder)
    model, offloaded = open_offloaded(source, args.device, folder)
    note(args, "calibrating from files, a block in memory at a time")
    tokenizer, text = load_tokenizer(source), read_text(args.calibrate or None)
    windows = windows_of(tokenizer, text, args.window_length, args.calibration_windows, model)
    if group.size > 1:
        note(args, f"{group.size} processes share {len(windows)} windows")
    dtype = options.stored_dtype(args)
    with weights_where_they_are_read(model):
        equalized = _equalize(args, offloaded, model, windows, dtype, group)
    return calibrate_offloaded(
        source, model, offloaded, output, windows, _with_head(args, model, plan), args.include, args.skip,
        int(args.shard_size * 1e9), args.overwrite, progress("calibrating", args.quiet), args.resume,
        not args.no_token_weights, dtype, {"recipe": _recipe(args), **equalized}, group,
    )  # fmt: skip


def quantize(args: argparse.Namespace, source, output: Path, plan, reference):
    """Write the calibrated model to `output`; returns a `Conversion`."""
    from flexq.checkpoint.convert import Conversion
    from flexq.checkpoint.placeless import Placeless
    from flexq.checkpoint.source import load_tokenizer
    from flexq.checkpoint.write import write_model
    from flexq.evaluate.text import Limits, read_text, windows_of
    from flexq.quantize.calibrate import calibrate_model
    from flexq.quantize.layers import shared_copy
    from flexq.quantize.placement import Placement
    from flexq.quantize.report import coverage

    tokenizer, text = load_tokenizer(source), read_text(args.calibrate or None)
    placeless = Placeless.in_source(source)  # before the long work, as it may fail
    windows = windows_of(tokenizer, text, args.window_length, args.calibration_windows, reference)
    length = min(_PROBE_LENGTH, Limits.of(reference).positions or _PROBE_LENGTH)
    probes = windows_of(tokenizer, text, length, model=reference)
    floats = reference if _alpha(args) == 0 else shared_copy(reference)
    equalized = _equalize(args, Placement(), floats, windows, _stored_dtype(args, source))

    def calibrate(to, resume: str | None = None, on=windows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it
            return calibrate_model(
                shared_copy(floats), on, to, args.include, args.skip, progress("calibrating", args.quiet),
                resume=resume, weigh_tokens=not args.no_token_weights, device=args.device,
            )  # fmt: skip

    plan = _with_head(args, floats, plan)
    if args.bits is not None or args.size is not None or args.weights:
        model = _mixed(args, source, reference, floats, plan, windows, probes, calibrate)
    else:
        model = calibrate(plan, args.resume)
    if args.budget is not None or (args.target_kl is not None and not args.weights) or args.target_ppl is not None:
        last = probes[-_PROBE_WINDOWS:]
        _choose_activations(args, model, reference, last, lambda: calibrate(_in_scheme(plan, "group")))
    model.flexq_plan.produced_by.update({"recipe": _recipe(args), "source": source.name})
    model.flexq_plan.produced_by.update(equalized)
    companions = source.folder
    sizes = write_model(
        model,
        output,
        None if companions is not None else tokenizer,
        int(args.shard_size * 1e9),
        args.overwrite,
        companions,
        _stored_dtype(args, source),
        beside=placeless.beside,
    )
    return Conversion(model.flexq_plan, coverage(model), sizes, placeless)


def _stored_dtype(args: argparse.Namespace, source):
    """Of what is not quantized: --dtype, bfloat16 for a .gguf file, else the model's (None)."""
    import torch

    dtype = options.stored_dtype(args)
    return torch.bfloat16 if dtype is None and source.gguf_file is not None else dtype


def _alpha(args: argparse.Namespace) -> float:
    from flexq.planning.mixed import BEST_ALPHA

    return args.equalize if args.equalize is not None else BEST_ALPHA if args.best else 0.0


def _equalize(args: argparse.Namespace, placement, model, windows, dtype, group=None) -> dict[str, Any]:
    """Equalize the model's inputs in place, if that is asked for; what its plan says of it."""
    from flexq.evaluate.text import spread
    from flexq.quantize.equalize import equalize_placed

    alpha = _alpha(args)
    if alpha == 0:
        return {}
    on = spread(windows, _FEW_WINDOWS)
    done = equalize_placed(placement, model, on, alpha, dtype, progress("equalizing", args.quiet), group)
    note(args, f"equalized (alpha {alpha:g}): the inputs of {done.count} layers, {len(done.norms)} by norms")
    return {"equalized": done.to_dict()}


def _recipe(args: argparse.Namespace) -> str:
    return "best" if args.best else "calibrated"


def _with_head(args: argparse.Namespace, model, plan):
    from flexq.planning.mixed import HEAD_BITS, with_head

    bits = args.head_bits or (str(HEAD_BITS) if args.best else None)
    if bits is None:
        return plan
    return with_head(model, plan, None if bits == "float" else int(bits))


def _mixed(args: argparse.Namespace, source, reference, floats, plan, windows, probes, calibrate: Callable[..., Any]):
    """The model with its weight bits chosen layer by layer, by --bits, --size or --target-kl, and then measured."""
    from flexq.evaluate.text import spread
    from flexq.planning.mixed import Mixed, bytes_beside, summary
    from flexq.planning.sensitivity import Divergence
    from flexq.planning.widths import covers, frontier, in_bytes

    costs = _width_costs(args, floats, plan) if args.budget_of == "time" else None
    mixed = Mixed.of(
        floats,
        spread(probes, _ESTIMATE_WINDOWS),
        plan,
        args.include,
        args.skip,
        progress("estimating widths", args.quiet),
        args.device,
        lambda at_6: calibrate(at_6, on=spread(windows, _FEW_WINDOWS)),
        costs,
    )
    divergence = Divergence(reference, probes[-_PROBE_WINDOWS:])
    if args.weights:
        model, reached = mixed.for_target(args.target_kl, calibrate, divergence)
    else:
        if args.size is not None:
            beside = bytes_beside(floats, mixed.plan, mixed.resolved, _stored_dtype(args, source)) + mixed.fixed_bytes
            least = beside + next(frontier(mixed.ranking, mixed.groups, in_bytes)).price
            if not covers(1e9 * args.size, least):
                enough = math.ceil(least / 1e3) / 1e6
                raise ValueError(f"--size must be {enough:g} or more with all that is stored, got {args.size:g}")
            chosen = mixed.at_bytes(1e9 * args.size - beside)
            how = {"size": args.size}
        else:
            chosen, how = mixed.at_bits(args.bits), {"asked_bits": args.bits}
        model = calibrate(mixed.plan_at(chosen, **how), args.resume)
        reached = divergence.mean(model)
        model.flexq_plan.produced_by["measured_kl"] = reached
    note(args, summary(mixed, model.flexq_plan))
    note(args, f"KL {reached:.5f} measured on {len(divergence.windows)} windows of {probes[0].shape[1]} tokens")
    return model


def _width_costs(args: argparse.Namespace, model, plan):
    from flexq.planning.costs import measure_width_costs
    from flexq.planning.mixed import chosen_layers

    configs = chosen_layers(model, plan, args.include, args.skip)
    return measure_width_costs(
        model, configs, args.cost_tokens, _cost_device(args), progress("timing layers", args.quiet)
    )


def _cost_device(args: argparse.Namespace) -> str:
    import torch

    return args.cost_device or ("cuda" if torch.cuda.is_available() else "cpu")


def _choose_activations(args: argparse.Namespace, model, reference, probes, in_group) -> None:
    """Give the calibrated model the activations' bits that --budget or a target asks for, and say what they are."""
    from flexq.planning import choose, sensitivity
    from flexq.planning.costs import measure_costs

    costs = None
    if args.a6 == "where-faster" or args.budget_of == "time":
        costs = measure_costs(model, args.cost_tokens, _cost_device(args), progress("timing layers", args.quiet))
    choice = choose.choose(
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
        progress("measuring layers", args.quiet),
    )
    sizes = {n: m.num_weights for n, m in sensitivity.quantized_layers(model).items()}
    at_8 = sum(sizes[name] for name in choice.at_8) / sum(sizes.values())
    for text in choice.notes:
        note(args, text)
    note(args, f"{len(choice.at_8)} of {len(sizes)} layers keep A8: {100 * at_8:.1f}% of the parameters")
    if choice.reached is not None:
        what, target = ("KL", args.target_kl) if args.target_kl is not None else ("perplexity", args.target_ppl)
        note(args, f"{what} {choice.reached:.5f} reached on {len(probes)} windows, at most {target:g} was asked for")


def _in_scheme(plan, scheme: str):
    """The plan with every layer's scales in one scheme."""
    layers = {n: c and dataclasses.replace(c, scheme=scheme) for n, c in plan.layers.items()}
    return dataclasses.replace(plan, defaults=dataclasses.replace(plan.defaults, scheme=scheme), layers=layers)
