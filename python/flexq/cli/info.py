"""`flexq info`: what a model or checkpoint is, or this installation."""

import argparse
import json
from typing import Any

from flexq.cli import options
from flexq.cli.output import megabytes, table

HELP = "What a model or checkpoint is (a FlexQ one is verified); without MODEL, this installation."


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help=options.MODEL_HELP)
    p.add_argument("--layers", action="store_true", help="list every layer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    result = _installation() if args.model is None else _model(args)
    if not args.json:
        print(table([["what", "value"], *_rows(result)]))
    return result


def _installation() -> dict[str, Any]:
    import torch

    from flexq import __version__, _core

    cuda = None
    if torch.cuda.is_available():
        try:
            cuda = _core.device_isa("cuda")
        except RuntimeError as error:
            cuda = str(error)
    return {
        "flexq": __version__,
        "torch": torch.__version__,
        "cpu": _core.device_isa("cpu"),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
    }


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
    from flexq.quantize.report import coverage

    verified = verify(source.folder)
    plan = read_plan(source.folder)
    model = skeleton(source, load_config(source))
    insert_layers(model, plan)
    formats: dict[str, int] = {}
    for c in plan.layers.values():
        bits = (
            "unquantized" if c is None else f"W{c.weight_bits}A{c.act_bits}, scheme {c.scheme}, rotation {c.rotation}"
        )
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
