"""The command line of `flexq`, and what every command has in common."""

import argparse
import importlib
import os
import signal
import sys
import warnings

from flexq.cli.options import EXIT_CODES, UsageError, threads
from flexq.cli.output import print_json

# Modules of this package, each a command of its name, or of the one in _NAMES.
_COMMANDS = ("quantize", "convert", "evaluate", "sensitivity", "generate", "info")
_NAMES = {"evaluate": "eval"}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--quiet", action="store_true", help="no progress bars (default: when stderr is no terminal)")
    common.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's)")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="flexq", epilog=EXIT_CODES, description="Language models with 6-bit weights and 6- or 8-bit activations."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(group, name: str, text: str, add_arguments, run) -> None:
        sub = group.add_parser(name, parents=[common], help=text, description=text, epilog=EXIT_CODES)
        add_arguments(sub)
        sub.set_defaults(run=run)

    for name in _COMMANDS:
        module = importlib.import_module(f"flexq.cli.{name}")
        command(commands, _NAMES.get(name, name), module.HELP, module.add_arguments, module.run)
    from flexq.cli import bench

    group = commands.add_parser("bench", help="Measure kernels.", description="Measure kernels.", epilog=EXIT_CODES)
    kinds = group.add_subparsers(dest="kind", metavar="WHAT", required=True)
    command(kinds, "linear", bench.LINEAR_HELP, bench.add_linear_arguments, bench.run_linear)
    command(kinds, "experts", bench.EXPERTS_HELP, bench.add_experts_arguments, bench.run_experts)
    command(kinds, "host", bench.HOST_HELP, bench.add_host_arguments, bench.run_host)
    command(kinds, "decode", bench.DECODE_HELP, bench.add_decode_arguments, bench.run_decode)
    return parser


def _prepare(args: argparse.Namespace) -> None:
    import torch
    from transformers.utils import logging

    from flexq.cli.options import resolve

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    resolve(args)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        from flexq._core import version

        print(f"flexq {version()}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _prepare(args)
        result = args.run(args)
        if args.json:
            print_json(result)
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"flexq: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _message(error: Exception) -> str:
    """One line that says what is wrong."""
    text = " ".join(str(error).split())
    expected = isinstance(error, (ValueError, OSError, RuntimeError)) and text
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"
