"""What a GGUF file says of itself: its metadata, not its tensors."""

from pathlib import Path
from typing import Any

from flexq.checkpoint.source import ModelError, ModelSource, need_gguf, one_line


def gguf_info(source: ModelSource) -> dict[str, Any]:
    """Architecture, size and formats of the tensors of a GGUF file.

    Raises:
        ModelError: the file is damaged, or the package gguf is missing.
    """
    need_gguf(source)
    from gguf import GGUFReader

    file = Path(source.path) / source.gguf_file
    try:
        reader = GGUFReader(file)
        field = reader.get_field("general.architecture")
        architecture = "unknown" if field is None else field.contents()
        formats: dict[str, int] = {}
        weights = 0
        for tensor in reader.tensors:
            formats[tensor.tensor_type.name] = formats.get(tensor.tensor_type.name, 0) + 1
            weights += int(tensor.n_elements)
    except Exception as error:  # whatever damaged files provoke in the reader
        raise ModelError(f"{file} is not a whole GGUF file: {one_line(error)}") from None
    return {
        "architecture": architecture,
        "quantized by": "llama.cpp",
        "bytes": file.stat().st_size,
        "weights": weights,
        "tensors": formats,
    }
