"""What commands print: tables, sizes, progress, notes."""

import argparse
import contextlib
import functools
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def peak_memory() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory(device: str) -> int:
    """Bytes that PyTorch has held at once on a CUDA device; 0 for the CPU."""
    import torch

    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def available_memory() -> int:
    """Bytes that the host can still give: what Linux says is available, within the limit of the control group."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


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
    print(json.dumps(value, indent=2, allow_nan=False))


def note(args: argparse.Namespace, text: str) -> None:
    """For people, beside the results: on stderr under --json."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def where_it_ran(device: str) -> str:
    """The device that was used, for people."""
    import torch

    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"
