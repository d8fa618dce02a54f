"""Checkpoints: safetensors shards and a config, read by memory map, never through pickle (docs/format.md)."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexq import ops
from flexq.fuse import fuse_model, unfuse_model
from flexq.linear import Linear
from flexq.models import ModelError, ModelSource, find_model, is_quantized, load_config, load_model, load_tokenizer
from flexq.patch import (
    Progress,
    linear_layers,
    lm_head_name,
    quantize_model,
    record_plan,
    resolve_plan,
    shared_copy,
    untie_lm_head,
)
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan

INDEX = "model.safetensors.index.json"
CHECKSUMS = "flexq.crc32"
DEFAULT_SHARD_BYTES = 2 << 30
_DTYPES = {"U8": "torch.uint8", "F16": "torch.float16"}  # of safetensors


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign or from a later version; the message names the file or tensor."""


# ---- Writing ---------------------------------------------------------------------------------------------------------


def require_free(path: Path, overwrite: bool = False) -> None:
    """Raises FileExistsError where writing a folder at `path` would lose something; an empty one there is nothing."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; choose another name or overwrite it")


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into, renamed to `path` at the end, removed if anything goes wrong before."""
    path = Path(path)
    require_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)  # mkdtemp makes folders private
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.rename(old / "old")
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _ShardWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are together."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[dict[str, torch.dtype]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self._flush()
        # A copy of its own: shared storage cannot be saved, and a mapped source must not be pinned.
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        checksums = json.dumps({name: _checksum(tensor) for name, tensor in self.pending.items()})
        file = self.folder / f"shard-{len(self.shards)}"
        save_file(self.pending, file, metadata={"format": "pt", CHECKSUMS: checksums})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        if self.pending:
            self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, config, plan: Plan, dtype: torch.dtype | None) -> None:
    from flexq.integrations.transformers import FlexQConfig

    settings = config.to_dict()
    if settings.get("dtype") is None and dtype is not None:
        # Else transformers would take the first tensor's, which may be a scale.
        settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["quantization_config"] = FlexQConfig(plan).to_dict()
    (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")


def _as_on_disk(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names, and in the parts, that the model's files have: transformers merges experts as it loads them."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors) if isinstance(model, PreTrainedModel) else tensors


def save_model(
    model,
    folder: str | Path,
    tokenizer=None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a quantized transformers model: shards, config with its plan, generation config and tokenizer.

    Args:
        model: as `quantize_model` or `load_model` return it.
        folder: where to; written aside and renamed, so that it is whole or not there.
        tokenizer: saved along if given.
        shard_bytes: largest size of a file.
        overwrite: replace a folder that is not empty.
    """
    if not any(isinstance(m, Linear) for m in model.modules()):
        raise ValueError("the model has no quantized layer; call flexq.quantize_model first")
    fusion = getattr(model, "flexq_fusion", None)
    if fusion is not None:
        unfuse_model(model)
        try:
            return save_model(model, folder, tokenizer, shard_bytes, overwrite)
        finally:
            fuse_model(model, fusion.kernels)
    plan = record_plan(model, getattr(model, "flexq_plan", Plan()))
    with new_folder(folder, overwrite) as aside:
        writer = _ShardWriter(aside, shard_bytes)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        others: dict[str, torch.Tensor] = {}
        # Module by module, so that only one layer's canonical form exists at a time.
        for prefix, module in model.named_modules():
            tensors: dict[str, torch.Tensor] = {}
            module._save_to_state_dict(tensors, f"{prefix}." if prefix else "", keep_vars=False)
            for name, tensor in tensors.items():
                where = (tensor.data_ptr(), tuple(tensor.shape))
                if isinstance(module, Linear):
                    writer.add(name, tensor)
                elif not tensor.numel() or where not in seen:  # else tied, as transformers ties it again
                    seen.add(where)
                    others[name] = tensor
        for name, tensor in _as_on_disk(model, others).items():
            writer.add(name, tensor)
        writer.finish()
        if not model.config.architectures:
            model.config.architectures = [type(model).__name__]
        _write_config(aside, model.config, plan, model.get_input_embeddings().weight.dtype)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    return Path(folder)


# ---- Quantizing without holding the model ----------------------------------------------------------------------------


def _source_shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise ModelError(f"{folder}: shard {missing[0]} is missing")
        return [folder / f for f in files]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"{folder} has neither model.safetensors nor {INDEX}; other formats load with --in-memory")
    return [single]


def _skeleton(config):
    """The model's modules without memory for their weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _embedding_name(model) -> str:
    """The tensor of the input embeddings; base models' checkpoints lack a prefix of it."""
    embeddings = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)


def _layer_of(tensor: str, layers: Iterable[str] | dict[str, Any], prefix: str) -> str | None:
    """The layer whose weight `tensor` is; checkpoints of a base model lack its prefix."""
    if not tensor.endswith(".weight"):
        return None
    name = tensor.removesuffix(".weight")
    for candidate in (name, f"{prefix}.{name}"):
        if candidate in layers:
            return candidate
    return None


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
) -> Plan:
    """Quantize a model from disk to disk. Safetensors folders go tensor by tensor, in memory of about one shard.

    Args:
        source: as for `flexq.models.find_model`; GGUF files and hub ids are loaded whole.
        folder: the new checkpoint, whole or not there.
        plan, include, skip: as for `quantize_model`.
        shard_bytes: largest size of a file.
        overwrite: replace a folder that is not empty.
        progress: wraps the loop over tensors or layers, e.g. `tqdm.tqdm`.
        loaded: the source's model if it is in memory already; left as it is.

    Returns:
        The plan as it was carried out.

    Raises:
        ModelError, ValueError: the source cannot be read, or the plan does not fit it; nothing is left behind.
    """
    source = source if isinstance(source, ModelSource) else find_model(source)
    if is_quantized(source):
        raise ModelError(f"{source.name} is quantized already")
    if source.folder is None or loaded is not None:
        model = load_model(source) if loaded is None else shared_copy(loaded)
        quantize_model(model, plan, include, skip, progress)
        model.flexq_plan.produced_by["source"] = source.name
        save_model(model, folder, load_tokenizer(source), shard_bytes, overwrite)
        return model.flexq_plan

    config = load_config(source)
    skeleton = _skeleton(config)
    resolved = resolve_plan(skeleton, plan, include, skip)
    shards = _source_shards(source.folder)
    every: dict[str, LayerConfig | None] = dict(resolved)
    for name in linear_layers(skeleton):
        every.setdefault(name, None)
    given = Plan.of(plan)
    record = Plan(given.defaults, every, {**given.produced_by, "source": source.name})
    with new_folder(folder, overwrite) as aside:
        writer = _ShardWriter(aside, shard_bytes)
        done = set()
        dtype = None  # of the source

        def quantize(layer: str, weight: torch.Tensor) -> None:
            settings = resolved[layer]
            try:
                planes, scales = ops.quantize_weight(weight, settings.scheme, settings.rotation)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from None
            writer.add(f"{layer}.qweight", planes)
            writer.add(f"{layer}.scales", scales)
            done.add(layer)

        tensors = [(shard, name) for shard in shards for name in _tensor_names(shard)]
        for shard, name in progress(tensors) if progress else tensors:
            tensor = _read(shard, name)
            if dtype is None and tensor.is_floating_point():
                dtype = tensor.dtype
            layer = _layer_of(name, resolved, skeleton.base_model_prefix)
            if layer is None:
                writer.add(name, tensor)
                continue
            quantize(layer, tensor)
        head = lm_head_name(skeleton)
        if head in resolved:
            untie_lm_head(skeleton)
            config = skeleton.config
            if head not in done:  # tied to the embeddings
                embedding = _embedding_name(skeleton)
                found = [(shard, name) for shard, name in tensors if embedding.endswith(name)]
                if found:
                    quantize(head, _read(*found[0]))
        left = [layer for layer in resolved if layer not in done]
        if left:
            raise ModelError(f"{source.name} holds no weight for layer {left[0]} (and {len(left) - 1} more)")
        writer.finish()
        _write_config(aside, config, record, dtype)
        _copy_companions(source.folder, aside)
    return record


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config and the like: the source's small files that are not weights."""
    for file in source.iterdir():
        weights = re.search(r"\.(safetensors|bin|pt|pth|gguf|msgpack|h5)(\.index\.json)?$", file.name)
        if file.is_file() and not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(file: Path):
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is not a whole safetensors file: {error}") from None


def _tensor_names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def _read(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as handle:
        return handle.get_tensor(name)


def read_plan(folder: str | Path) -> Plan:
    """The plan of a FlexQ checkpoint."""
    from flexq.integrations.transformers import FlexQConfig

    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        settings = dict(config["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no quantization_config in config.json ({error})") from None
    if settings.pop("quant_method", None) != "flexq":
        raise CheckpointError(f"{folder}: quant_method is not flexq")
    try:
        return FlexQConfig(**settings).plan
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def verify(folder: str | Path) -> None:
    """Check that a FlexQ checkpoint is what was written: every tensor there, of its shape and type, and unchanged where
    its file has checksums (those that transformers' `save_pretrained` wrote have none).

    Raises:
        CheckpointError: naming the file and tensor.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in _source_shards_of_checkpoint(folder):
        with _opened(file) as handle:
            metadata = handle.metadata() or {}
            names = set(handle.keys())
            if CHECKSUMS not in metadata:  # by `save_pretrained` of transformers
                for name in names:
                    part = handle.get_slice(name)
                    seen[name] = (_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                continue
            checksums = json.loads(metadata[CHECKSUMS])
            for name in sorted(set(checksums) | names):
                if name not in names:
                    raise CheckpointError(f"{file.name}: tensor {name} is missing")
                if name not in checksums:
                    raise CheckpointError(f"{file.name}: tensor {name} does not belong there")
                tensor = handle.get_tensor(name)
                if _checksum(tensor) != checksums[name]:
                    raise CheckpointError(f"{file.name}: tensor {name} has changed since it was written")
                seen[name] = (str(tensor.dtype), tuple(tensor.shape))
    for layer, config in plan.layers.items():
        if config is not None:
            _verify_layer(layer, config, seen)


def _verify_layer(layer: str, config: LayerConfig, seen: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for tensor in (f"{layer}.qweight", f"{layer}.scales"):
        if tensor not in seen:
            raise CheckpointError(f"tensor {tensor} is missing from the checkpoint")
    dtype, shape = seen[f"{layer}.qweight"]
    if dtype != "torch.uint8" or len(shape) != 4 or shape[2:] != (6, 16):
        raise CheckpointError(f"tensor {layer}.qweight must be uint8 [N, G, 6, 16], got {dtype} {list(shape)}")
    expected = (shape[0], shape[1] if config.scheme == "group" else 1)
    dtype, shape = seen[f"{layer}.scales"]
    if dtype != "torch.float16" or shape != expected:
        raise CheckpointError(f"tensor {layer}.scales must be float16 {list(expected)}, got {dtype} {list(shape)}")


def _source_shards_of_checkpoint(folder: Path) -> list[Path]:
    try:
        return _source_shards(folder)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / INDEX} is not a weight index: {error}") from None
