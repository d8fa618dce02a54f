"""Which `_core.Stream` a tensor's work runs on: its device, the current CUDA stream, PyTorch's threads."""

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
