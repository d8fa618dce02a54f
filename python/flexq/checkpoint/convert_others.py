"""Converting quantized checkpoints of others from disk to disk, codes and scales as they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flexq import ops
from flexq.checkpoint.folder import new_folder, require_free
from flexq.checkpoint.keys import targets_of
from flexq.checkpoint.others import SUFFIXES, Format, Layer, format_of
from flexq.checkpoint.placeless import Placeless
from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    Reader,
    Weights,
    config_dict,
    find_model,
    load_config,
    skeleton,
)
from flexq.checkpoint.verify import require_loadable
from flexq.checkpoint.write import DEFAULT_SHARD_BYTES, ShardWriter, copy_companions, write_config
from flexq.plan import LayerConfig, Plan
from flexq.progress import Progress
from flexq.quantize.layers import left_alone, linear_layers, lm_head_name, some, weight_of


@dataclass
class Converted:
    """What became of a checkpoint.

    Args:
        plan: of the new one.
        method, bits: of the old one.
        layers: that were converted.
        changes: what the new one computes otherwise, for people.
    """

    plan: Plan
    method: str
    bits: int
    layers: int
    changes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "bits": self.bits, "layers": self.layers, "changes": self.changes}


def convert_checkpoint(
    source: str | Path | ModelSource,
    folder: str | Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """A quantized checkpoint of compressed-tensors, GPTQ or AutoRound as a FlexQ checkpoint, its codes and scales the
    same. Weights must be symmetric integers of 4, 5, 6 or 8 bits with a scale per row or per 128 inputs.

    Args:
        source: a folder, or a hub id that is in the cache.
        folder: the new checkpoint, whole or not there.
        shard_bytes: largest size of a file.
        overwrite: replace a FlexQ checkpoint that is there.
        progress: wraps the loop over tensors.

    Returns:
        What was converted, and what changes: activations, which FlexQ quantizes to 8 bits at run time.

    Raises:
        ModelError: the source cannot be read, or FlexQ cannot hold it exactly; nothing is left behind.
        OSError: something is in the way at `folder`, or the disk is full; nothing is left behind.
    """
    source = source if isinstance(source, ModelSource) else find_model(source)
    if source.folder is None:
        raise ModelError(f"{source.name} must be a folder with safetensors files to be converted")
    form = format_of(config_dict(source))
    require_free(folder, overwrite, source.folder)
    config = load_config(source)
    del config.quantization_config
    model = skeleton(source, config)
    tensors = list(Weights.of(source.folder).tensors())
    files = {name: file for file, name in tensors}
    quantized = _quantized_layers(model, files)
    layers = {
        name: LayerConfig(act_bits=8, scheme=_scheme(form), rotation="none", weight_bits=form.bits)
        for name in quantized.values()
    }
    kept = dict.fromkeys((*linear_layers(model), *left_alone(model)))
    record = Plan(LayerConfig(), {**kept, **layers}, {"source": source.name, "converted_from": form.method})
    own = {f"{on_disk}.{tensor}" for on_disk in quantized for tensor in form.tensors}
    targets = targets_of(model, [name for name in files if name not in own])
    placeless = Placeless.of(model, [(file, name) for file, name in tensors if name not in own], targets)
    if any(name.endswith(SUFFIXES) for _, name in placeless.beside):  # quantized there too, which is not ours to read
        placeless = Placeless([], [*placeless.left_out, *(name for _, name in placeless.beside)])
    left_out = set(placeless.left_out)
    dtype = None
    with new_folder(folder, overwrite, source.folder) as aside:
        writer, read = ShardWriter(aside, shard_bytes, record.fingerprint()), Reader()
        for file, name in progress(tensors) if progress else tensors:
            on_disk = next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), None)
            if on_disk in quantized:
                planes, scales = _canonical(model, quantized[on_disk], on_disk, form, files, read)
                writer.add(f"{on_disk}.qweight", planes)
                writer.add(f"{on_disk}.scales", scales)
            elif name not in own:
                tensor = read(file, name)
                if name in left_out:
                    _require_unused(name, tensor, quantized)
                    continue
                dtype = dtype or (tensor.dtype if tensor.is_floating_point() else None)
                writer.add(name, tensor)
        read.close()
        writer.finish()
        write_config(aside, config, record, None, dtype)
        copy_companions(source.folder, aside)
        require_loadable(aside, source.name)
    per = "token" if form.group == 0 else f"token and {ops.GROUP_SIZE} inputs"
    changes = [f"activations: {form.activations} before, now 8 bits with a scale per {per}, quantized at run time"]
    if form.cache is not None:
        changes.append(f"KV cache: {form.cache} before, now as it is served")
    if placeless.left_out:
        changes.append(f"left out, as the model has no place for them: {some(placeless.left_out)}")
    return Converted(record, form.method, form.bits, len(quantized), changes)


def _scheme(form: Format) -> str:
    return "channel" if form.group == 0 else "group"


def _quantized_layers(model, files) -> dict[str, str]:
    """Layers by their names on disk: the names in the model."""
    on_disk = [name.removesuffix(s) for name in files for s in SUFFIXES if name.endswith(s)]
    if not on_disk:
        raise ModelError(f"no tensor ends in {' or '.join(SUFFIXES)}: the files do not fit their config.json")
    targets = targets_of(model, [f"{name}.weight" for name in on_disk])
    linear = linear_layers(model)
    found = {}
    for name in on_disk:
        target = targets[f"{name}.weight"]
        layer = target.name.removesuffix(".weight") if target is not None else None
        if layer is not None and layer == lm_head_name(model):
            raise ModelError(f"{name} is a quantized LM head, which is not converted; leave it out of the quantization")
        if target is None or target.is_part or layer not in linear:
            raise ModelError(
                f"{name} is no linear layer of {type(model).__name__} by itself (experts are merged), and is not "
                "converted; quantize the model in floating point that it was made from"
            )
        found[name] = layer
    return found


def _require_unused(name: str, tensor: torch.Tensor, quantized) -> None:
    """ModelError for a bias that the model's layer does not have, unless it is zero: AutoGPTQ wrote such."""
    layer, _, kind = name.rpartition(".")
    if layer in quantized and kind == "bias" and tensor.any():
        raise ModelError(f"{name} is not zero, and the model's layer has no bias")


def _canonical(model, layer: str, on_disk: str, form: Format, files, read: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's planes and scales."""
    module = model.get_submodule(layer)
    n, k = weight_of(module, module.weight).shape

    def read_own(tensor: str) -> torch.Tensor | None:
        name = f"{on_disk}.{tensor}"
        return read(files[name], name) if name in files else None

    given: Layer = form.read(form, on_disk, read_own, n, k)
    codes = F.pad(given.codes, (0, ops.num_groups(k) * ops.GROUP_SIZE - k))
    return ops.pack_codes(codes.contiguous(), given.bits), given.scales
