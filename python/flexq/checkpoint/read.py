"""Loading models, quantized or not."""

from pathlib import Path

import torch

from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    config_dict,
    find_model,
    is_quantized,
    load_config,
    model_class,
    need_gguf,
    one_line,
    quantization_of,
    snapshot_of,
)
from flexq.checkpoint.verify import verify_files
from flexq.execution import resolve_device


def load_model(
    model: str | Path | ModelSource, dtype: torch.dtype | str = "auto", device: str = "cpu", verify: bool = True
):
    """Load a model of transformers, quantized by FlexQ or not, ready for inference.

    Its class is the one that the checkpoint names in `architectures`: a causal language model, an encoder, an
    encoder-decoder, ...

    Args:
        model: as for `flexq.checkpoint.source.find_model`: a folder, a GGUF file, a hub id or a built-in name.
        dtype: of the floating point tensors; "auto" takes the checkpoint's (float32 for GGUF).
        device: where to; "auto" is a usable GPU, else the CPU.
        verify: check the tensors of a FlexQ checkpoint against their checksums first.

    Raises:
        ModelError: it cannot be found or read, or lacks tensors.
        CheckpointError: a FlexQ checkpoint is damaged; the message names the tensor.
    """
    import flexq.integrations.transformers  # noqa: F401  (registers the quantization method)

    source = model if isinstance(model, ModelSource) else find_model(model)
    need_gguf(source)
    device = resolve_device(device)
    quantized = is_quantized(source)
    if quantized and verify:
        source = snapshot_of(source)
        verify_files(source.folder)
    elif not quantized and (method := quantization_of(config_dict(source))) is not None:
        raise ModelError(f"{source.name} was quantized by {method}, not by FlexQ; load it with transformers")
    config = load_config(source)
    kind = model_class(source, config)
    if source.gguf_file is not None and dtype == "auto":
        dtype = torch.float32
    try:
        loaded, info = kind.from_pretrained(source.path, dtype=dtype, output_loading_info=True, **source.load_kwargs)
    except ModelError:
        raise
    except MemoryError as error:
        raise ModelError(f"not enough memory for {source.name}: {one_line(error)}") from None
    except Exception as error:  # whatever damaged files provoke in a model's class
        raise ModelError(f"cannot load {source.name}: {one_line(error)}") from None
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(f"{source.name} lacks tensor {missing[0]}{more}; it would begin at random")
    return loaded.to(device).eval()
