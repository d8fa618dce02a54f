"""What commands print: tables, sizes, progress, notes."""

import argparse
import functools
import json
import resource
import sys
from typing import Any


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def peak_memory() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: list[list[str]]) -> str:
    """First row is the header; all columns but the first are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def evaluation_table(results) -> str:
    rows = [["model", "perplexity", "change", "KL", "linear weights on disk", "in memory"]]
    for r in results:
        change = "" if r.perplexity_change is None else f"{100 * r.perplexity_change:+.2f}%"
        kl = "" if r.kl is None else f"{r.kl:.4f}"
        rows.append([r.name, f"{r.perplexity:.3f}", change, kl, megabytes(r.disk_bytes), megabytes(r.memory_bytes)])
    return table(rows)


def progress(description: str, quiet: bool):
    from tqdm import tqdm

    return functools.partial(tqdm, desc=description, disable=quiet or None, file=sys.stderr, leave=False)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def note(args: argparse.Namespace, text: str) -> None:
    """For people, beside the results: on stderr under --json."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def where_it_ran(device: str) -> str:
    """The device that was used, for people."""
    import torch

    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"
