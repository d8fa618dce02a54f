"""`flexq bench`: measure kernels and whole models."""

import argparse
from typing import Any

from flexq.cli import options
from flexq.cli.options import UsageError, add_device, positive, positive_float, shape
from flexq.cli.output import note, progress, table, where_it_ran

LINEAR_HELP = "A whole linear layer, quantization included, against PyTorch's."
EXPERTS_HELP = "A whole layer of a mixture of experts with random routing, against transformers' in bf16."
HOST_HELP = "What an operator costs the host, a call, beside PyTorch's linear layer."
DECODE_HELP = "Decode steps and prefills of a whole model with random weights."


def add_linear_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shape", type=shape, action="append", metavar="NxK", help="may be repeated")
    p.add_argument("--tokens", type=positive, nargs="+", metavar="M", help="tokens (default: 1 2 4 ...)")
    add_device(p, "to measure")
    dtypes = ("float32", "bfloat16", "float16")
    p.add_argument("--dtype", choices=dtypes, help="of x and y (default: float32, on a GPU bfloat16)")
    widths = (4, 5, 6, 8)
    p.add_argument("--weight-bits", type=int, choices=widths, nargs="+", default=[6], metavar="B", help="(default: 6)")
    p.add_argument("--no-peers", action="store_true", help="FlexQ alone")
    p.add_argument("--explain", action="store_true", help="instead: every kernel that could run each GEMM, measured")
    fit_help = "instead: fit the dispatcher's costs to this GPU, into a file for the variable FLEXQ_COSTS (minutes)"
    p.add_argument("--fit", metavar="FILE", help=fit_help)
    p.add_argument("--plot", metavar="PNG", help="also draw throughput against M (needs matplotlib)")


def run_linear(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexq import _core
    from flexq.bench import explain, linear, report

    where = where_it_ran(args.device)
    bar = progress("benchmark", args.quiet)
    if args.fit:
        return _fit(args, where, bar)
    if args.explain:
        choices = explain.explain_linear(args.shape, args.tokens, args.device, progress=bar)
        costs = explain.cost_table(args.device)[0]
        if not args.json:
            print(f"{explain.table(choices)}\n{where}; costs of table {costs}")
        return {"device": where, "cost_table": costs, "choices": [c.to_dict() for c in choices]}
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    points: list[linear.Point] = []
    try:
        linear.bench_linear(
            args.shape,
            args.tokens,
            dtype,
            args.device,
            peers=not args.no_peers,
            progress=bar,
            report=points.extend,
            weight_bits=args.weight_bits,
        )
    except KeyboardInterrupt:  # it can take minutes: what there is of it
        if points and not args.json:
            print(report.linear_table(points), flush=True)
        raise
    isa = _core.device_isa(torch.device(args.device).type)
    if not args.json:
        print(report.linear_table(points))
        print(f"{isa}, {where}, x and y in {points[0].dtype}")
    if args.plot:
        report.plot_linear(points, args.plot)
    return {"isa": isa, "device": where, "points": [p.to_dict() for p in points]}


# Of decoder layers of 7 to 70 billion parameters, and tokens of decode and of prompts.
_FIT_SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (10240, 8192), (8192, 28672))
_FIT_TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)


def _fit(args: argparse.Namespace, where: str, bar) -> dict[str, Any]:
    from pathlib import Path

    from flexq.bench import explain, fit

    options.require_writable("--fit", args.fit)
    if args.device == "cpu":
        raise UsageError("--fit is for a GPU: the CPU has one kernel for each shape")
    configs = ((8, "group"), (8, "channel"))
    shapes, tokens = args.shape or _FIT_SHAPES, args.tokens or _FIT_TOKENS
    choices = explain.explain_linear(shapes, tokens, args.device, configs, bar, within=4.0)
    name, table = explain.cost_table(args.device)
    found = fit.fit(choices, table, progress=progress("fitting", args.quiet))
    comment = f"Fitted by `flexq bench linear --fit` to {len(choices)} GEMMs on {where}, beginning with {name}."
    Path(args.fit).write_text(fit.text_of(found.table, comment))
    note(
        args,
        f"{args.fit}: mean error of the estimates {100 * found.error_before:.0f}% -> {100 * found.error:.0f}%, choices "
        f"slower than the fastest kernel by {100 * found.regret_before:.1f}% -> {100 * found.regret:.1f}% on average\n"
        f"use it with FLEXQ_COSTS={args.fit}",
    )
    return {"device": where, "file": args.fit, **{k: v for k, v in vars(found).items() if k != "table"}}


def add_experts_arguments(p: argparse.ArgumentParser) -> None:
    shape_help = "qwen3-30b-a3b (default), mixtral-8x7b, gpt-oss-20b or deepseek-v3"
    p.add_argument("--shape", default="qwen3-30b-a3b", metavar="NAME", help=shape_help)
    p.add_argument("--tokens", type=positive, nargs="+", metavar="M", help="tokens (default: 1 4 16 ...)")
    add_device(p, "to measure")
    p.add_argument("--no-peers", action="store_true", help="FlexQ alone")


def run_experts(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.bench import experts, report

    bar = progress("benchmark", args.quiet)
    points = experts.bench_experts(args.shape, args.tokens, args.device, not args.no_peers, bar)
    where = where_it_ran(args.device)
    if not args.json:
        print(f"{args.shape}, {where}\n{report.experts_table(points)}")
    return {"device": where, "points": [p.to_dict() for p in points]}


def add_host_arguments(p: argparse.ArgumentParser) -> None:
    add_device(p, "to measure")


def run_host(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.bench.host import bench_host

    points, where = bench_host(args.device), where_it_ran(args.device)
    if not args.json:
        print(table([["operator", "host us a call"], *([p.operator, f"{p.microseconds:.1f}"] for p in points)]))
        print(where)
    return {"device": where, "points": [p.to_dict() for p in points]}


def add_decode_arguments(p: argparse.ArgumentParser) -> None:
    shape_help = "llama-2-7b (default), llama-2-13b, llama-2-70b, llama-3.1-8b, qwen3-30b-a3b or smollm2-135m"
    p.add_argument("--shape", default="llama-2-7b", metavar="NAME", help=shape_help)
    p.add_argument("--contenders", nargs="+", metavar="NAME", help="'flexq W6A8', 'flexq W6A6', bf16, W8A8, fp8, ...")
    p.add_argument("--batches", type=positive, nargs="+", default=(1, 4, 8, 16, 64), metavar="B", help="tokens a step")
    p.add_argument("--contexts", type=positive, nargs="+", default=(128, 4096), metavar="N", help="tokens before it")
    p.add_argument("--prefills", type=positive, nargs="*", default=(512, 4096), metavar="N", help="prompts to time")
    add_device(p, "to measure")
    p.add_argument("--memory-limit", type=positive_float, metavar="GB", help="use no more of the GPU's memory")
    p.add_argument("--side-by-side", action="store_true", help="prepare all contenders at once, in a process each")
    p.add_argument("--no-breakdown", action="store_true", help="do not profile a step")


def run_decode(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.bench import decode, report

    def tell(point: decode.DecodePoint) -> None:  # each as it comes: the table is a long time coming
        what = f"prefill of {point.context}" if point.prefill else f"step, batch {point.batch}, context {point.context}"
        note(args, f"{point.contender}: {what}: {point.milliseconds:.2f} ms")

    points = decode.bench_decode(
        args.shape,
        args.contenders,
        args.batches,
        args.contexts,
        args.prefills,
        args.device,
        not args.no_breakdown,
        None if args.memory_limit is None else args.memory_limit * 1e9,
        args.side_by_side,
        progress("benchmark", args.quiet),
        tell,
    )
    if not points:
        raise ValueError(f"no contender fits in memory at {args.shape}")
    where = where_it_ran(args.device)
    if not args.json:
        print(f"{args.shape}, {where}\n{report.decode_table(points)}")
    return {"device": where, "points": [p.to_dict() for p in points]}
