"""What else a PyTorch user could run a linear layer with: PyTorch's own, cuBLAS, Humming."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.bench.timing import Kernel, Kernels, copies_of


class CpuPeers:
    def __init__(self, weight: torch.Tensor):
        self.weight, self.half = weight, weight.bfloat16()
        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what a plain PyTorch user has
            self.dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)

    def kernels(self, x: torch.Tensor) -> Kernels:
        x32, x16, size = x.float(), x.bfloat16(), self.weight.numel()
        return {
            "torch float32": Kernel([lambda: nn.functional.linear(x32, self.weight)], 4 * size),
            "torch bfloat16": Kernel([lambda: nn.functional.linear(x16, self.half)], 2 * size),
            "torch dynamic int8": Kernel([lambda: self.dynamic(x32)], size),
        }


HUMMING_INPUTS = {"W6A8": {"dtype": "int8", "group_size": ops.GROUP_SIZE}, "W6A16": None}


def humming_layer(weight: torch.Tensor, inputs: str) -> nn.Module:
    """A layer of the package humming-kernels with 6-bit weights, a scale per group of 128.

    Args:
        weight: [N, K], or of a stack of experts [E, N, K], on a GPU.
        inputs: of HUMMING_INPUTS.

    Raises:
        ImportError: the package is not installed.
        ValueError: K is no multiple of the group, which the package's quantizer does not check.
    """
    from humming.layer import HummingLayer

    *stack, n, k = weight.shape
    if k % ops.GROUP_SIZE:
        raise ValueError(f"K is {k}, no multiple of {ops.GROUP_SIZE}")
    config = HUMMING_INPUTS[inputs]
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        num_experts=stack[0] if stack else None,
        weight_config={"dtype": "int6", "group_size": ops.GROUP_SIZE},
        input_config=None if config is None else dict(config),
        torch_dtype=torch.bfloat16,
    ).to(weight.device)
    if stack:  # one by one, as the codes take 32 bits each until they are packed
        for expert, matrix in enumerate(weight):
            tensors = layer.weight_schema.quant_tensor(matrix.bfloat16(), layer.weight_schema, torch.bfloat16)
            for name, tensor in tensors.items():
                getattr(layer, name)[expert].copy_(tensor)
    else:
        layer.load_from_unquantized(weight.bfloat16())
    layer.transform()
    return layer


class CudaPeers:
    """cuBLAS through PyTorch, and Humming where it is installed. cuBLAS int8 and fp8 are given activations that are
    quantized already; Humming quantizes them, as FlexQ does."""

    def __init__(self, weight: torch.Tensor):
        self.humming = self._humming(weight)
        self.half = self._copies(weight.bfloat16())
        self.int8 = self._copies((weight / weight.abs().max() * 127).round().to(torch.int8))
        self.fp8 = self._copies((weight / weight.abs().max() * 448).to(torch.float8_e4m3fn))
        self.one = torch.ones((), device=weight.device)

    @staticmethod
    def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
        count = copies_of(weight.nbytes)
        return [weight, *(weight.clone() for _ in range(count - 1))]

    @staticmethod
    def _humming(weight: torch.Tensor) -> dict[str, list[nn.Module]]:
        """W6A8 and W6A16 with a scale per group of 128, one layer a copy of the weight."""
        copies = copies_of(weight.numel() * 49 / 64)
        layers: dict[str, list[nn.Module]] = {}
        for name in HUMMING_INPUTS:
            try:
                for _ in range(copies):
                    layers.setdefault(f"Humming {name}", []).append(humming_layer(weight, name))
            except ImportError:
                return {}
            except Exception as error:  # whatever a version of it does not do is left out, and said
                warnings.warn(f"Humming {name} is left out: {error}", stacklevel=2)
                layers.pop(f"Humming {name}", None)
        return layers

    def kernels(self, x: torch.Tensor) -> Kernels:
        half = x.bfloat16()
        rows = max(x.shape[0], 17)  # cuBLAS takes no fewer in int8
        int8 = torch.randint(-127, 128, (-(-rows // 8) * 8, x.shape[1]), dtype=torch.int8, device=x.device)
        fp8 = torch.randn(-(-x.shape[0] // 16) * 16, x.shape[1], device=x.device).to(torch.float8_e4m3fn)
        candidates: dict[str, tuple[list[torch.Tensor], Callable[[torch.Tensor], Any]]] = {
            "cuBLAS bfloat16": (self.half, lambda w: nn.functional.linear(half, w)),
            "cuBLAS int8": (self.int8, lambda w: torch._int_mm(int8, w.t())),
            "cuBLAS fp8": (
                self.fp8,
                lambda w: torch._scaled_mm(fp8, w.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.bfloat16),
            ),
        }
        kernels = {}
        for name, (weights, function) in candidates.items():
            try:
                function(weights[0])
            except RuntimeError:
                continue  # a shape or GPU that it does not do
            runs = [lambda w=w, function=function: function(w) for w in weights]
            kernels[name] = Kernel(runs, weights[0].nbytes)
        for name, layers in self.humming.items():
            size = sum(p.nbytes for p in layers[0].parameters())
            kernels[name] = Kernel([lambda layer=layer: layer(half) for layer in layers], size)
        return kernels
