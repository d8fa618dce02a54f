"""Quantizing a model from disk to disk."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.checkpoint.folder import new_folder, require_free
from flexq.checkpoint.keys import Target, kept_names, made_of, targets_of
from flexq.checkpoint.placeless import Placeless
from flexq.checkpoint.read import load_model
from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    Reader,
    Weights,
    float_model,
    load_config,
    load_tokenizer,
    skeleton,
)
from flexq.checkpoint.verify import require_loadable
from flexq.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    Sizes,
    copy_companions,
    name_on_disk,
    write_config,
    write_model,
)
from flexq.embedding import CONFIG
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.progress import Progress
from flexq.quantize.experts import PROJECTIONS, kind_of, module_of, round_experts, whole_of
from flexq.quantize.layers import (
    input_embeddings,
    left_alone,
    lm_head_name,
    name_of,
    output_embeddings,
    shared_copy,
    untie_lm_head,
    weight_at,
    weight_of,
)
from flexq.quantize.model import quantize_model, resolve_plan
from flexq.quantize.report import Coverage, coverage


@dataclass
class Conversion:
    """What became of a model.

    Args:
        plan: as it was carried out.
        coverage: which share of the weights is quantized.
        sizes: what the folder's bytes are of.
        placeless: tensors of the source that the model's class has no place for.
    """

    plan: Plan
    coverage: Coverage
    sizes: Sizes
    placeless: Placeless


def quantize_checkpoint(
    source: str | Path | ModelSource,
    folder: str | Path,
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include=None,
    skip=(),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    loaded=None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Quantize a model from disk to disk. Safetensors folders go tensor by tensor, in memory of about one shard, or of
    one layer's experts.

    Args:
        source: as for `flexq.checkpoint.source.find_model`; GGUF files are loaded whole, hub ids downloaded.
        folder: the new checkpoint, whole or not there.
        plan: as for `quantize_model`.
        include: likewise.
        skip: likewise.
        shard_bytes: largest size of a file.
        overwrite: replace a FlexQ checkpoint that is there.
        progress: wraps the loop over tensors or layers, e.g. `tqdm.tqdm`.
        loaded: the source's model if it is in memory already; left as it is.
        dtype: of what is not quantized; None keeps the source's, bfloat16 for GGUF files.

    Returns:
        The plan as it was carried out. A warning names the largest weights that are left, if they are many.

    Raises:
        ModelError, ValueError: the source cannot be read, or the plan does not fit it; nothing is left behind.
        OSError: something is in the way at `folder`, or the disk is full; nothing is left behind.
    """
    done = convert(source, folder, plan, include, skip, shard_bytes, overwrite, progress, loaded, dtype)
    if done.coverage.warning:
        warnings.warn(done.coverage.warning, stacklevel=2)
    return done.plan


def convert(
    source, folder, plan, include, skip, shard_bytes, overwrite, progress, loaded=None, dtype: torch.dtype | None = None
) -> Conversion:
    """`quantize_checkpoint`, with all that can be said of it."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    source = float_model(source)
    require_free(folder, overwrite, source.folder)
    if source.folder is None or loaded is not None:
        return _convert_loaded(source, folder, plan, include, skip, shard_bytes, overwrite, progress, loaded, dtype)
    config = load_config(source)
    model = skeleton(source, config)
    given = Plan.of(plan)
    resolved, embedding = resolve_plan(model, given, include, skip)
    every = resolved if embedding is None else {**resolved, embedding: CONFIG}
    weights = Weights.of(source.folder)
    tensors = list(weights.tensors())
    targets = targets_of(model, [name for _, name in tensors])
    found = {target.name for target in targets.values() if target is not None}
    if any(t is not None and _is_interwoven(t, every) for t in targets.values()) or _only_head(model, found):
        # transformers makes a layer's weight of several tensors, or several layers' experts of the same ones, or the
        # embedding of the LM head's.
        return _convert_loaded(source, folder, plan, include, skip, shard_bytes, overwrite, progress, None, dtype)
    named: dict[str, LayerConfig | None] = {**every, **{n: None for n in left_alone(model) if n not in every}}
    record = Plan(given.defaults, named, {**given.produced_by, "source": source.name}, given.embeddings)
    with new_folder(folder, overwrite, source.folder) as aside:
        writer = ShardWriter(aside, shard_bytes, record.fingerprint(), dtype)
        placeless = Placeless.of(model, tensors, targets)
        work = _TensorByTensor(source, model, every, writer, tensors, targets, placeless)
        for file, name in progress(tensors) if progress else tensors:
            work.take(file, name)
        work.finish(tensors)
        work.read.close()
        if work.vanished:
            record.produced_by["vanished_scales"] = work.vanished
        writer.finish()
        write_config(aside, model.config, record, dtype, work.dtype)
        copy_companions(source.folder, aside)
        require_loadable(aside, source.name)
    sizes = writer.sizes_by_part(name_of(model, input_embeddings(model)), name_of(model, output_embeddings(model)))
    return Conversion(record, coverage(model, every), sizes, placeless)


def _only_head(model, found: set[str]) -> bool:
    """Whether of an embedding and an LM head that are tied only the head is in the files."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    head = f"{lm_head_name(model)}.weight"
    return head in found and head in tied and tied[head] not in found


def _layer_of(target: Target) -> str:
    return target.name.removesuffix(".weight")


def _is_layer(target: Target | None, resolved) -> bool:
    """Whether it is the weight of a linear layer, or of an embedding, to be quantized."""
    return target is not None and target.name.endswith(".weight") and _layer_of(target) in resolved


def _is_interwoven(target: Target, resolved) -> bool:
    """Whether a layer cannot be quantized with this target's tensors alone in view."""
    if not target.is_part:
        return False
    layers = [name.removesuffix(".weight") for name in target.names if name.endswith(".weight")]
    experts = [name for name in target.names if name.endswith(PROJECTIONS)] if target.others else []
    return any(name in resolved for name in (*layers, *experts))


class _TensorByTensor:
    """Takes a checkpoint's tensors one after the other, and writes what becomes of them."""

    def __init__(self, source, model, resolved, writer: ShardWriter, tensors, targets, placeless: Placeless):
        self.source, self.model, self.resolved, self.writer, self.targets = source, model, resolved, writer, targets
        self.read = Reader()
        self.left_out = set(placeless.left_out)
        self.dtype: torch.dtype | None = None  # of the source
        self.done: set[str] = set()
        self.vanished = 0
        self.shared = _shared_names(model, resolved)
        layers = {n.removesuffix(".weight"): _layer_of(t) for n, t in targets.items() if _is_layer(t, resolved)}
        self.kept_names = kept_names(model, layers)
        self.files: dict[str, Path] = {}
        self.parts: dict[str, list[str]] = {}  # the tensors on disk that an experts' tensor is made of
        for file, name in tensors:
            self.files[name] = file
            target = targets[name]
            if target is not None and self._experts_of(target) is not None:
                self.parts.setdefault(target.name, []).append(name)

    def take(self, file: Path, name: str) -> None:
        target = self.targets[name]
        if name in self.left_out:
            return
        if target is not None and target.name in self.parts:
            if name == self.parts[target.name][0]:
                self._take_experts(target)
            return
        tensor = self.read(file, name)
        self._note_dtype(tensor)
        if _is_layer(target, self.resolved):
            layer, on_disk = _layer_of(target), name.removesuffix(".weight")
            if on_disk not in self.kept_names:
                on_disk = name_on_disk(self.model, f"{layer}.qweight").removesuffix(".qweight")
            self._quantize(layer, on_disk, tensor)
        else:
            self.writer.add(name, tensor)

    def _note_dtype(self, tensor: torch.Tensor) -> None:
        if self.dtype is None and tensor.is_floating_point():
            self.dtype = tensor.dtype

    def _experts_of(self, target: Target) -> str | None:
        """The projection that a tensor is the weight or bias of, if it is one of experts to be quantized."""
        layer = target.name.removesuffix("_bias")
        return layer if layer.endswith(PROJECTIONS) and layer in self.resolved else None

    def _take_experts(self, target: Target) -> None:
        """A projection's weight, or bias, of all experts at once."""
        names, layer = self.parts[target.name], self._experts_of(target)
        if target.is_part:
            parts = [(name, functools.partial(self.read, self.files[name], name)) for name in names]
            tensor = made_of(self.model, target, parts)[target.name]
        else:
            tensor = self.read(self.files[names[0]], names[0])
        self._note_dtype(tensor)
        module = self.model.get_submodule(whole_of(layer))
        expected = tuple(getattr(module, target.name.rpartition(".")[2]).shape)
        if tuple(tensor.shape) != expected:
            raise ModelError(f"tensor {target.name} is {list(tensor.shape)}, the model's {list(expected)}")
        made = {"bias": tensor}
        if target.name == layer:
            planes, scales, vanished = round_experts(layer, kind_of(module).oriented(tensor), self.resolved[layer])
            made = {"qweight": planes, "scales": scales}
            self.vanished += vanished
            self.done |= {layer, *self.shared.get(layer, ())}
        for name, value in made.items():
            self.writer.add(name_on_disk(self.model, f"{layer}.{name}"), value)

    def _quantize(self, layer: str, on_disk: str, tensor: torch.Tensor) -> None:
        config, module = self.resolved[layer], self.model.get_submodule(layer)
        weight = weight_of(module, tensor)
        expected = tuple(weight_of(module, module.weight).shape)
        if tuple(weight.shape) != expected:
            raise ModelError(f"layer {layer}: its weight is {list(weight.shape)}, the model's {list(expected)}")
        try:
            planes, scales = ops.quantize_weight(
                weight.contiguous(), config.scheme, config.rotation, config.weight_bits
            )
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from None
        self.vanished += ops.count_vanished(weight, scales)
        self.writer.add(f"{on_disk}.qweight", planes)
        self.writer.add(f"{on_disk}.scales", scales)
        self.done |= {layer, *self.shared.get(layer, ())}

    def finish(self, tensors: list[tuple[Path, str]]) -> None:
        """What has no tensor of its own: an LM head that is tied to the embeddings, whose bias may be tied too."""
        head = lm_head_name(self.model)
        if head in self.resolved:
            files = {target.name: (file, name) for file, name in tensors if (target := self.targets[name]) is not None}
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            embeddings = f"{name_of(self.model, input_embeddings(self.model))}.weight"
            sources = [name for name in (tied.get(f"{head}.weight"), embeddings) if name in files]
            if head not in self.done and sources:
                self._quantize(head, head, self.read(*files[sources[0]]))
            bias = tied.get(f"{head}.bias")
            if f"{head}.bias" not in files and bias in files:
                self.writer.add(f"{head}.bias", self.read(*files[bias]))
            untie_lm_head(self.model)
        left = [layer for layer in self.resolved if layer not in self.done]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise ModelError(f"{self.source.name} holds no weight for layer {left[0]}{more}")


def _shared_names(model, resolved) -> dict[str, list[str]]:
    """Layers that stand at several names, which files hold once. An LM head is not what its embedding is."""
    by_weight: dict[int, list[str]] = {}
    for name in resolved:
        if isinstance(module_of(model, name), nn.Embedding):
            continue
        by_weight.setdefault(id(weight_at(model, name)), []).append(name)
    return {name: names for names in by_weight.values() if len(names) > 1 for name in names}


def _convert_loaded(
    source: ModelSource, folder, plan, include, skip, shard_bytes, overwrite, progress, loaded, dtype
) -> Conversion:
    if dtype is None and source.gguf_file is not None:
        dtype = torch.bfloat16
    model = load_model(source) if loaded is None else shared_copy(loaded)
    placeless = Placeless.in_source(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller says it
        quantize_model(model, plan, include, skip, progress)
    model.flexq_plan.produced_by["source"] = source.name
    tokenizer = None if source.folder is not None else load_tokenizer(source)
    sizes = write_model(model, folder, tokenizer, shard_bytes, overwrite, source.folder, dtype, beside=placeless.beside)
    return Conversion(model.flexq_plan, coverage(model), sizes, placeless)
