"""The model that a checkpoint was made from, found again by its recorded name."""

from pathlib import Path
from typing import Any

import torch

from flexq.checkpoint.layers import read_plan
from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    Weights,
    find_model,
    is_quantized,
    load_config,
    opened,
    snapshot_of,
)

# What a checkpoint's configuration may have otherwise than its source's.
_MAY_DIFFER = {"quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
               "tie_word_embeddings", "architectures"}  # fmt: skip
_MATRICES, _ROWS = 4, 64  # of them are compared


def recorded_source(checkpoint: ModelSource) -> str | None:
    """What a checkpoint says that it was made from: the name that was given then, which may be a relative path."""
    found = read_plan(snapshot_of(checkpoint).folder).produced_by.get("source")
    return found if isinstance(found, str) else None


def why_not_source_of(checkpoint: ModelSource, name: str) -> str | None:
    """Why the model that goes by the recorded name here cannot be what the checkpoint was made from, if so: a relative
    path is another folder from elsewhere. To follow "NAME, which CHECKPOINT was made from, "."""
    try:
        found = find_model(name)
    except ModelError:
        return "is not here"
    if not Path(found.path).exists():
        return "is not here"
    if is_quantized(found):
        return "is not here, but a checkpoint of that name"
    difference = _difference(load_config(checkpoint).to_dict(), load_config(found).to_dict())
    if difference is not None:
        return f"is another model here ({difference})"
    tensor = _other_tensor(snapshot_of(checkpoint), found)
    return None if tensor is None else f"is another model here (tensor {tensor} has other values)"


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first setting that two configurations have differently."""
    for key in sorted(one.keys() & other.keys() - _MAY_DIFFER):
        a, b = one[key], other[key]
        if isinstance(a, dict) and isinstance(b, dict):
            if (inside := _difference(a, b)) is not None:
                return f"{key}.{inside}"
        elif a != b:
            return f"{key} is {b!r}, not {a!r}"
    return None


def _other_tensor(checkpoint: ModelSource, source: ModelSource) -> str | None:
    """A tensor that a checkpoint left in floating point and its source has otherwise, by the first rows of the largest
    matrices; None where one is the same, or there is nothing to compare: equalizing changes linear layers."""
    if checkpoint.folder is None or source.folder is None:
        return None
    plan = read_plan(checkpoint.folder)
    equalized = {f"{name}.weight" for name in plan.layers} if "equalized" in plan.produced_by else set()
    try:
        ours, theirs = (_matrices(s.folder) for s in (checkpoint, source))
    except ModelError:
        return None  # weights in other files
    names = [n for n in ours if n not in equalized and n in theirs and ours[n][1] == theirs[n][1]]
    names = sorted(names, key=lambda name: -ours[name][1][0] * ours[name][1][1])[:_MATRICES]
    for name in names:
        written, read = (_rows(found[name][0], name) for found in (ours, theirs))
        if torch.equal(read.to(written.dtype), written):
            return None
    return names[0] if names else None


def _matrices(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of each matrix in floating point."""
    found = {}
    for file in Weights.of(folder).files:
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                if part.get_dtype() in ("F64", "F32", "F16", "BF16") and len(part.get_shape()) == 2:
                    found[name] = (file, tuple(part.get_shape()))
    return found


def _rows(file: Path, name: str) -> torch.Tensor:
    with opened(file) as handle:
        return handle.get_slice(name)[:_ROWS]
