"""Writing checkpoints (docs/reference/formats.md): safetensors, a config with the plan, what else a model has."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flexq.checkpoint.folder import new_folder
from flexq.checkpoint.keys import keep_quantized_whole
from flexq.checkpoint.layers import settings_of
from flexq.checkpoint.source import INDEX, SINGLE, ModelError, Reader, is_own
from flexq.checkpoint.verify import PLAN_HASH, require_loadable
from flexq.checksum import CHECKSUMS, checksum
from flexq.plan import Plan
from flexq.quantize.layers import input_embeddings, name_of, output_embeddings, record_plan

DEFAULT_SHARD_BYTES = 2 << 30


@dataclass
class Sizes:
    """Bytes of a checkpoint's tensors by what they are of.

    Args:
        linear: quantized layers, scales included.
        embeddings: of tokens, quantized or not; the LM head's too where the two are tied.
        head: the LM head.
        other: norms, biases, and layers that are not quantized.
    """

    linear: int = 0
    embeddings: int = 0
    head: int = 0
    other: int = 0

    def __str__(self) -> str:
        parts = (("quantized layers", self.linear), ("embeddings", self.embeddings), ("LM head", self.head))
        named = [f"{what} {size / 1e6:,.1f} MB" for what, size in (*parts, ("others", self.other)) if size]
        return ", ".join(named)


def save_sorted(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes are the same every time. OSError if it cannot be written."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {file.name}: {error}") from None
    # The library writes the metadata in an order of its own each time; sorted, the header has the same length.
    with open(file, "r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            handle.seek(8)
            handle.write(text.ljust(length))


@dataclass
class ShardWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are together.

    Args:
        folder: where to.
        shard_bytes: largest size of a file, unless one tensor is larger.
        plan_hash: of the checkpoint's plan, kept in each file.
        dtype: of floating point tensors but scales; None leaves them as they are.
    """

    folder: Path
    shard_bytes: int
    plan_hash: str
    dtype: torch.dtype | None = None
    total_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """ModelError for a name that is taken: one of the two would be lost."""
        if name in self.sizes:
            raise ModelError(f"several of the model's tensors would be {name} in its files, and cannot be written")
        if self.dtype is not None and tensor.is_floating_point() and not name.endswith(".scales"):
            given, tensor = tensor, tensor.to(self.dtype)
            if self.dtype == torch.float16 and tensor.isinf().sum() > given.isinf().sum():
                raise ModelError(f"tensor {name} has values up to {given.abs().max():.4g}, float16 up to 65504")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        # A copy of its own: shared storage cannot be saved, and a mapped source must not be pinned.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self.total_bytes += size
        self.sizes[name] = size

    def _flush(self) -> None:
        checksums = json.dumps({name: checksum(tensor) for name, tensor in self._pending.items()})
        metadata = {"format": "pt", CHECKSUMS: checksums, PLAN_HASH: self.plan_hash}
        save_sorted(self._pending, self.folder / f"shard-{len(self._shards)}", metadata)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def sizes_by_part(self, embeddings: str | None, head: str | None) -> Sizes:
        """Where the bytes are. `embeddings`, `head`: the modules' names, as tensors on disk begin or end with them."""
        sizes = Sizes()
        for name, size in self.sizes.items():
            module = name.rpartition(".")[0]
            if embeddings and (embeddings.endswith(module) or module.endswith(embeddings)):
                part = "embeddings"
            elif name.endswith((".qweight", ".scales")):
                part = "linear"
            elif head and (head.endswith(module) or module.endswith(head)):
                part = "head"
            else:
                part = "other"
            setattr(sizes, part, getattr(sizes, part) + size)
        return sizes


def write_config(
    folder: Path, config, plan: Plan, dtype: torch.dtype | None = None, found: torch.dtype | None = None
) -> None:
    """config.json with the plan. Its dtype is `dtype`, else the config's own, else the one that was `found`."""
    settings = config.to_dict()
    if dtype is not None or (settings.get("dtype") is None and found is not None):
        # Without one, transformers would take the first tensor's, which may be a scale.
        settings["dtype"] = str(dtype or found).removeprefix("torch.")
    settings["quantization_config"] = settings_of(plan)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")


def as_on_disk(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names, and in the parts, that the model's files have: transformers merges experts as it loads them."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return tensors
    keep_quantized_whole(model)
    return revert_weight_conversion(model, tensors)


def save_model(
    model,
    folder: str | Path,
    tokenizer=None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    companions: str | Path | None = None,
) -> Path:
    """Write a quantized transformers model: shards, config with its plan, generation config and tokenizer.

    Args:
        model: as `quantize_model` or `load_model` return it; fused or not.
        folder: where to; written aside and renamed, so that it is whole or not there.
        tokenizer: saved along if given.
        shard_bytes: largest size of a file.
        overwrite: replace a FlexQ checkpoint that is there.
        companions: a folder whose small files (tokenizer, chat templates, processors) are copied along.

    Raises:
        ValueError: nothing is quantized, or weights are not in memory.
        OSError: something is in the way, or the disk is full; nothing is left behind.
    """
    if not any(getattr(m, "is_flexq_layer", False) for m in model.modules()):
        raise ValueError("the model has no quantized layer; call flexq.quantize_model first")
    write_model(model, folder, tokenizer, shard_bytes, overwrite, companions)
    return Path(folder)


def write_model(
    model,
    folder,
    tokenizer,
    shard_bytes: int,
    overwrite: bool,
    companions,
    dtype: torch.dtype | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
    beside: Sequence[tuple[Path, str]] = (),
) -> Sizes:
    """`save_model`, with another dtype for what is not quantized, what reads tensors that are on the meta device, and
    files and names of tensors that are copied beside the model's; returns what the bytes are of."""
    plan = record_plan(model, getattr(model, "flexq_plan", Plan()))
    with new_folder(folder, overwrite, companions) as aside:
        writer = ShardWriter(aside, shard_bytes, plan.fingerprint(), dtype)
        _add_tensors(model, writer, read)
        with contextlib.closing(Reader()) as read_beside:
            for file, name in beside:
                writer.add(name, read_beside(file, name))
        writer.finish()
        if not model.config.architectures:
            model.config.architectures = [type(model).__name__]
        embeddings = input_embeddings(model)
        like = getattr(embeddings, "weight", None)
        found = like.dtype if isinstance(like, torch.Tensor) else getattr(model, "dtype", None)
        write_config(aside, model.config, plan, dtype, found)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if companions is not None:
            copy_companions(Path(companions), aside)
        if _is_of_transformers(model):
            require_loadable(aside, type(model).__name__)
    return writer.sizes_by_part(name_of(model, embeddings), name_of(model, output_embeddings(model)))


def _is_of_transformers(model) -> bool:
    """Whether a checkpoint's config.json leads to the model's class, rather than to another one, or to none."""
    import transformers

    return getattr(transformers, model.config.architectures[0], None) is type(model)


def _add_tensors(model, writer: ShardWriter, read: Callable[[str], torch.Tensor] | None) -> None:
    held: dict[tuple[int, tuple[int, ...]], str] = {}
    others: dict[str, torch.Tensor] = {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # Module by module, so that only one layer's canonical form exists at a time.
    for prefix, module in model.named_modules():
        tensors: dict[str, torch.Tensor] = {}
        module._save_to_state_dict(tensors, f"{prefix}." if prefix else "", keep_vars=True)
        for name, tensor in tensors.items():
            where = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tuple(tensor.shape))
            if getattr(module, "is_flexq_layer", False):
                if name == f"{prefix}.bias":  # files may have several layers' in one
                    others[name] = tensor
                    continue
                writer.add(name_on_disk(model, name), _in_memory(name, tensor, read))
                continue
            if tensor.numel() and where in held:  # tied, as transformers ties it again: one name, the one that it saves
                if held[where] not in tied or name in tied:
                    continue
                del others[held[where]]
            held[where] = name
            others[name] = tensor
    for group in [others] if read is None else _by_block(others):
        tensors = {name: _in_memory(name, tensor, read) for name, tensor in group.items()}
        for name, tensor in as_on_disk(model, tensors).items():
            writer.add(name, tensor)


def _in_memory(name: str, tensor: torch.Tensor, read: Callable[[str], torch.Tensor] | None) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor.detach()
    if read is None:
        raise ValueError(f"tensor {name} is not in memory (offloaded, or on the meta device)")
    return read(name)


def _by_block(tensors: dict[str, torch.Tensor]) -> Iterable[dict[str, torch.Tensor]]:
    """Those of a block together, as files may have several of them in one tensor; others module by module."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        block = re.match(r".*?\.\d+\.", name)
        groups.setdefault(block.group() if block else name.rpartition(".")[0], {})[name] = tensor
    return groups.values()


def name_on_disk(model, name: str) -> str:
    """The name in files of a quantized layer's tensor."""
    (renamed,) = as_on_disk(model, {name: torch.empty(0, device="meta")})
    return renamed


_WEIGHT_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".ot",
    ".ckpt",
    ".npz",
    ".index.json",
)
_OTHERS_CODE = (".py", ".sh", ".so")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation and processor configs: a model's files that are no weights and no code."""
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            (folder / file.name).mkdir(exist_ok=True)
            for template in sorted(file.iterdir()):
                _copy(source, template, folder / file.name / template.name)
        elif not file.name.startswith(".") and not file.name.endswith((*_WEIGHT_FILES, *_OTHERS_CODE)):
            _copy(source, file, folder / file.name)


def _copy(source: Path, file: Path, to: Path) -> None:
    if file.is_file() and not os.path.lexists(to) and is_own(source, file):
        shutil.copyfile(file, to)
