"""Where work runs: the device that is meant by "auto", and the `_core.Stream` of a tensor (its device, the current CUDA
stream, PyTorch's threads)."""

import functools

import torch

from flexq import _core


@functools.cache
def _cpu_stream(num_threads: int) -> _core.Stream:
    return _core.Stream.cpu(num_threads)


@functools.lru_cache(maxsize=256)
def _cuda_stream(index: int, handle: int) -> _core.Stream:
    return _core.Stream.cuda(index, handle)


def stream_for(device: torch.device) -> _core.Stream:
    """The stream for tensors on `device`. CPU work uses `torch.get_num_threads()` threads."""
    if device.type == "cpu":
        return _cpu_stream(torch.get_num_threads())
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _cuda_stream(index, torch.cuda.current_stream(index).cuda_stream)
    raise ValueError(f"flexq runs on devices cpu and cuda, got {device.type}")


def resolve_device(device: str) -> str:
    """ "auto" as "cuda" where a GPU can be used by this build, else "cpu"; anything else as it is.

    Raises:
        ValueError: it names no device of FlexQ.
        RuntimeError: a device that was named cannot be used; with the reason.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and _usable("cuda") else "cpu"
    if device != "cpu":
        try:
            kind = torch.device(device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}")
        _core.check_device(kind)
    return device


def _usable(device: str) -> bool:
    try:
        _core.check_device(device)
    except RuntimeError:
        return False
    return True
