"""`flexq convert`: others' quantized checkpoints."""

import argparse
import time
from pathlib import Path
from typing import Any

from flexq.cli.output import note, progress

HELP = "Convert a checkpoint of compressed-tensors, GPTQ or AutoRound, codes and scales as they are."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="DIR", help="a quantized checkpoint: symmetric integers, per row or per 128 inputs")
    p.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the new checkpoint")
    p.add_argument("--overwrite", action="store_true", help="replace a FlexQ checkpoint that is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint.convert_others import convert_checkpoint

    begin = time.perf_counter()
    done = convert_checkpoint(
        args.model, args.output, overwrite=args.overwrite, progress=progress("converting", args.quiet)
    )
    if not args.json:
        print(f"{args.output}: {done.layers} layers of {done.bits} bits, from {done.method}")
    for change in done.changes:
        note(args, change)
    return {"output": str(args.output), **done.to_dict(), "seconds": time.perf_counter() - begin}
