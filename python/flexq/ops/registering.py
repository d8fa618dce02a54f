"""Operators in PyTorch's registry, `torch.ops.flexq.*`: their kernels in C++ or Python, and what stands for them in
tracing."""

import functools

import torch

from flexq import _core

_library = torch.library.Library("flexq", "DEF")
_DEVICES = ("CPU", "CUDA")


def define(schema: str, fake):
    """Registers the decorated function for every device that has no kernel in C++ for it, and `fake` for tracing."""

    def register(function):
        name = _library.define(schema)
        for device in _DEVICES:
            if not _core.implement_operator(name, device):
                _library.impl(name, function, device)
        torch.library.register_fake(f"flexq::{name}", _only_for_tracing(name, fake), lib=_library)
        return function

    return register


def _only_for_tracing(name: str, fake):
    """`fake`, which PyTorch also calls where some of the tensors have values and others are on the meta device: it
    would return memory as it is found."""

    @functools.wraps(fake)
    def checked(*args, **kwargs):
        every = (*args, *kwargs.values())
        tensors = [t for t in every if type(t) in (torch.Tensor, torch.nn.Parameter)]  # not those of a trace
        if tensors and not all(t.is_meta for t in tensors):
            devices = ", ".join(str(t.device) for t in tensors)
            raise RuntimeError(f"flexq::{name} needs all of its tensors on one device, got {devices}")
        return fake(*args, **kwargs)

    return checked
