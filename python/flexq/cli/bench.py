"""`flexq bench`: measure kernels and whole models."""

import argparse
from typing import Any

from flexq.cli.options import add_device, positive, positive_float, shape
from flexq.cli.output import note, progress, where_it_ran

LINEAR_HELP = "A whole linear layer, quantization included, against PyTorch's."
DECODE_HELP = "Decode steps and prefills of a whole model with random weights."


def add_linear_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shape", type=shape, action="append", metavar="NxK", help="may be repeated")
    p.add_argument("--tokens", type=positive, nargs="+", metavar="M", help="tokens (default: 1 2 4 ...)")
    add_device(p, "to measure")
    dtypes = ("float32", "bfloat16", "float16")
    p.add_argument("--dtype", choices=dtypes, help="of x and y (default: float32, on a GPU bfloat16)")
    p.add_argument("--no-peers", action="store_true", help="FlexQ alone")
    p.add_argument("--explain", action="store_true", help="instead: every kernel that could run each GEMM, measured")
    p.add_argument("--plot", metavar="PNG", help="also draw throughput against M (needs matplotlib)")


def run_linear(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flexq import _core
    from flexq.bench import explain, linear, report

    where = where_it_ran(args.device)
    bar = progress("benchmark", args.quiet)
    if args.explain:
        choices = explain.explain_linear(args.shape, args.tokens, args.device, progress=bar)
        if not args.json:
            print(explain.table(choices))
        return {"device": where, "choices": [c.to_dict() for c in choices]}
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
        )
    except KeyboardInterrupt:  # it can take minutes: what there is of it
        if points and not args.json:
            print(report.linear_table(points), flush=True)
        raise
    isa = _core.device_isa(torch.device(args.device).type)
    if args.plot:
        report.plot_linear(points, args.plot)
    if not args.json:
        print(report.linear_table(points))
        print(f"{isa}, {where}, x and y in {points[0].dtype}")
    return {"isa": isa, "device": where, "points": [p.to_dict() for p in points]}


def add_decode_arguments(p: argparse.ArgumentParser) -> None:
    shape_help = "llama-2-7b (default), llama-2-13b, llama-2-70b, llama-3.1-8b or smollm2-135m"
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
