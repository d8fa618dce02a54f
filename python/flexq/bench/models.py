"""Whole models of a known shape with random weights, made layer by layer where they are needed, so that nothing is
downloaded and no model is ever there in floating point unless it is measured so."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from flexq import ops
from flexq.bench.peers import humming_layer
from flexq.linear import Linear
from flexq.plan import LayerConfig
from flexq.quantize.layers import linear_layers, replace_module
from flexq.run.fuse import fuse_model

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


class Int8Linear(nn.Module):
    """W8A8 on a GPU: weights int8 with a scale per output channel, activations with one per token, cuBLAS between."""

    _FEWEST = 17  # tokens that torch._int_mm takes

    def __init__(self, n: int, k: int, device, dtype):
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.full((n,), 0.02 / 73, dtype=torch.float32, device=device))
        self.in_features, self.out_features = k, n
        self.weight_bytes = self.stored_bytes = n * (k + 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features).float()
        scale = flat.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
        codes = (flat / scale).round().to(torch.int8)
        m = codes.shape[0]
        if m < self._FEWEST:
            codes = nn.functional.pad(codes, (0, 0, 0, 32 - m))
        y = torch._int_mm(codes, self.codes.t())[:m]
        return (y * (scale * self.scales)).to(x.dtype).view(*x.shape[:-1], self.out_features)


class Fp8Linear(nn.Module):
    """W8A8 in float8_e4m3: weights with a scale per output channel, activations with one per token, cuBLAS between."""

    def __init__(self, n: int, k: int, device, dtype):
        super().__init__()
        weight = torch.randn((n, k), dtype=torch.bfloat16, device=device) * 100
        self.register_buffer("codes", weight.clamp(-448, 448).to(torch.float8_e4m3fn))
        self.register_buffer("scales", torch.full((1, n), 0.02 / 100, dtype=torch.float32, device=device))
        self.in_features, self.out_features = k, n
        self.weight_bytes = self.stored_bytes = n * (k + 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features).float()
        scale = flat.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
        codes = (flat / scale).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(codes, self.codes.t(), scale_a=scale, scale_b=self.scales, out_dtype=torch.bfloat16)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class HummingLinear(nn.Module):
    """W6A8 of the package humming-kernels, scales per group of 128."""

    def __init__(self, n: int, k: int, device, dtype):
        super().__init__()
        self.layer = humming_layer(torch.randn((n, k), dtype=torch.bfloat16, device=device) * 0.02, "W6A8")
        self.in_features, self.out_features = k, n
        self.weight_bytes = self.stored_bytes = sum(p.nbytes for p in self.layer.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def _float_linear(n: int, k: int, device, dtype) -> nn.Module:
    layer = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    layer.weight.requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _flexq_linear(config: LayerConfig) -> Callable[..., nn.Module]:
    def make(n: int, k: int, device, dtype) -> nn.Module:
        groups = ops.num_groups(k)
        planes = torch.randint(0, 256, (n, groups, config.weight_bits, 16), dtype=torch.uint8, device=device)
        if k % ops.GROUP_SIZE:
            _zero_padding(planes, k)
        scales = torch.full(
            (n, groups if config.scheme == "group" else 1), 0.02 / 18, dtype=torch.float16, device=device
        )
        like = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
        return Linear.from_canonical(planes, scales, like, config)

    return make


def _zero_padding(planes: torch.Tensor, k: int) -> None:
    """Codes past K are zero."""
    bits = torch.arange(ops.GROUP_SIZE).view(16, 8) < k % ops.GROUP_SIZE
    mask = (bits.int() << torch.arange(8)).sum(1).to(torch.uint8)
    planes[:, -1] &= mask.to(planes.device)


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Args:
        name: of the table's column.
        make: n, k, device and dtype to a linear layer with random weights.
        compiled: by torch.compile, else eager. On a GPU a step is one CUDA graph in any case.
        fused: by `fuse_model`.
        lm_head: whether it is one of those layers too.
    """

    name: str
    make: Callable[..., nn.Module]
    compiled: bool = True
    fused: bool = False
    lm_head: bool = False


CONTENDERS = {
    c.name: c
    for c in (
        Contender("flexq W6A8", _flexq_linear(LayerConfig()), fused=True),
        Contender("flexq W6A6", _flexq_linear(LayerConfig(act_bits=6)), fused=True),
        Contender("flexq W6A8 channel", _flexq_linear(LayerConfig(scheme="channel")), fused=True),
        Contender("flexq W6A8 head", _flexq_linear(LayerConfig()), fused=True, lm_head=True),
        Contender("bf16", _float_linear),
        Contender("bf16 graph", _float_linear, compiled=False),
        Contender("W8A8", Int8Linear),
        Contender("fp8", Fp8Linear),
        Contender(
            "Humming W6A8", HummingLinear, compiled=False
        ),  # compiles its kernels itself, when they are first used
    )
}
DEFAULT_CONTENDERS = ("flexq W6A8", "flexq W6A6", "bf16", "bf16 graph", "W8A8", "fp8")
CPU_CONTENDERS = ("flexq W6A8", "bf16")


def shape_config(shape: str) -> dict[str, int]:
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
    return SHAPES[shape]


def make_model(shape: str, contender: Contender, device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama of that shape and random weights on `device`, its linear layers made by the contender one by one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**({"vocab_size": 32000, "max_position_embeddings": 8192} | shape_config(shape)), dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    for name, linear in linear_layers(model).items():
        replace_module(model, name, contender.make(linear.out_features, linear.in_features, device, dtype))
    head = contender.make if contender.lm_head else _float_linear
    model.lm_head = head(config.vocab_size, config.hidden_size, device, dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                value = torch.ones if parameter.dim() == 1 else torch.randn
                filled = value(parameter.shape, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    if contender.fused:
        fuse_model(model)
    return model
