"""What counts as a linear layer: modules that compute x W^T + b, found by what they do."""

import copy
import functools
import inspect
import math

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# What a linear layer may be made of: products, sums, and other views of the same values.
_OPERATIONS = {
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "add", "t", "transpose", "permute", "view",
    "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "clone", "detach", "alias",
}  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b: `nn.Linear`, a class made from it that does the same (Falcon's), or
    transformers' Conv1D (GPT-2), whose weight is [K, N]. Not one whose forward or weight somebody has replaced, but for
    accelerate, which moves tensors to where they are used."""
    if type(module) is not nn.Linear and not (_is_linear_class(type(module)) and _is_linear_itself(module)):
        return False
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return not replaced and "weight" in module._parameters


@functools.cache
def _is_linear_class(kind: type) -> bool:
    derived = issubclass(kind, nn.Linear)
    if not derived and kind.__name__ != "Conv1D":
        return False
    if kind.__module__.startswith("torch."):
        return False  # a part of something that does not call it, such as nn.MultiheadAttention
    try:
        if len(inspect.signature(kind.forward).parameters) != 2:
            return False  # its callers may say more than x
        with torch.device("cpu"), torch.no_grad():
            small = kind(8, 16) if derived else kind(16, 8)
            return small.bias is not None and _operations_if_linear(small) is not None
    except Exception:  # whatever a module that is no such thing provokes
        return False


def _is_linear_itself(module: nn.Module) -> bool:
    """Of a module whose class is linear as it is made by default: whether this one is, whatever it was made with. It is
    compared at a small size, and must do the same operations at its own."""
    if module._parameters.keys() - {"weight", "bias"} or module._buffers or module._modules:
        return False
    small = copy.copy(module)
    for name, size in (("in_features", 8), ("out_features", 16), ("nx", 8), ("nf", 16)):
        if name in vars(small):
            vars(small)[name] = size
    operations = _operations_if_linear(small)
    return operations is not None and operations == _operations_of(copy.copy(module), _inputs(module))


def _inputs(module: nn.Module) -> int:
    return module.weight.shape[1 if isinstance(module, nn.Linear) else 0]


def _operations_if_linear(small: nn.Module) -> list[tuple[str, int]] | None:
    """Whether a module is linear by what it does, given a weight for 8 inputs and 16 outputs and, if it has one, a
    bias: `_operations_of` it then, else None. Its hooks are not asked."""
    try:
        with torch.device("cpu"), torch.no_grad():
            weight = torch.linspace(-1, 1, 128, dtype=torch.float32).view(16, 8)
            bias = None if small._parameters.get("bias") is None else torch.linspace(1, 2, 16, dtype=torch.float32)
            own = {"weight": weight if isinstance(small, nn.Linear) else weight.T.contiguous(), "bias": bias}
            vars(small)["_parameters"] = {name: t if t is None else nn.Parameter(t) for name, t in own.items()}
            for shape in ((3, 8), (2, 3, 8)):
                x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float32).view(shape)
                y = type(small).forward(small, x)
                if not torch.allclose(y, nn.functional.linear(x, weight, bias), atol=1e-5):
                    return None
            return _operations_of(small, 8)
    except Exception:  # whatever a module that is no such thing provokes
        return None


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations: list[tuple[str, int]] = []  # and how many tensors each is given

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append((func.overloadpacket.__name__, sum(isinstance(a, torch.Tensor) for a in args)))
        return func(*args, **(kwargs or {}))


def _operations_of(module: nn.Module, inputs: int) -> list[tuple[str, int]] | None:
    """What PyTorch is asked to do in a forward pass of two dimensions and of three, without doing it; None if some of
    it is not of a linear layer, so that it depends on values (a clamp) or is not understood."""
    meta = {name: t if t is None else nn.Parameter(t.detach().to("meta")) for name, t in module._parameters.items()}
    vars(module)["_parameters"] = meta
    try:
        with torch.device("meta"), torch.no_grad(), _Recorder() as recorder:
            for shape in ((3, inputs), (2, 3, inputs)):
                type(module).forward(module, torch.empty(shape, dtype=meta["weight"].dtype))
    except Exception:  # whatever a module that is no such thing provokes
        return None
    done = [operation for operation in recorder.operations if operation[0] != "empty"]
    return done if _OPERATIONS.issuperset(name for name, _ in done) else None
