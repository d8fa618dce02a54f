"""Whole models of a known shape with random weights, made layer by layer where they are needed, so that nothing is
downloaded and no model is ever there in floating point unless it is measured so."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.bench.peers import humming_layer
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.plan import LayerConfig
from flexq.quantize.layers import linear_layers, replace_module
from flexq.run.fuse import fuse_model

SHAPES: dict[str, dict[str, Any]] = {
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
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
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


def _random_canonical(rows: tuple[int, ...], k: int, config: LayerConfig, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random planes [*rows, G, 6, 16], whose codes past K are zero, and scales [*rows, G or 1]."""
    groups = ops.num_groups(k)
    planes = torch.randint(0, 256, (*rows, groups, 6, 16), dtype=torch.uint8, device=device)
    if k % ops.GROUP_SIZE:
        bits = torch.arange(ops.GROUP_SIZE).view(16, 8) < k % ops.GROUP_SIZE
        planes[..., -1, :, :] &= (bits.int() << torch.arange(8)).sum(1).to(torch.uint8).to(device)
    per_row = groups if config.scheme == "group" else 1
    return planes, torch.full((*rows, per_row), 0.02 / 18, dtype=torch.float16, device=device)


def random_experts(config: LayerConfig, experts: int, hidden: int, intermediate: int, device, dtype) -> Experts:
    """Of random planes: no float weights are made."""
    gate_up = _random_canonical((experts, 2 * intermediate), hidden, config, device)
    down = _random_canonical((experts, hidden), intermediate, config, device)
    return Experts.from_canonical(gate_up, down, intermediate, gate_up_config=config, dtype=dtype)


def _flexq_linear(config: LayerConfig) -> Callable[..., nn.Module]:
    def make(n: int, k: int, device, dtype) -> nn.Module:
        like = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
        return Linear.from_canonical(*_random_canonical((n,), k, config, device), like, config)

    return make


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Args:
        name: of the table's column.
        make: n, k, device and dtype to a linear layer with random weights.
        compiled: by torch.compile, else eager. On a GPU a step is one CUDA graph in any case.
        fused: by `fuse_model`.
        lm_head: whether it is one of those layers too.
        experts: numbers of experts, features outside and inside, device and dtype to experts with random weights; None:
            there are none of this kind. Those of bf16 are the model's own.
    """

    name: str
    make: Callable[..., nn.Module]
    compiled: bool = True
    fused: bool = False
    lm_head: bool = False
    experts: Callable[..., nn.Module] | None = None


def _flexq(name: str, config: LayerConfig, lm_head: bool = False) -> Contender:
    return Contender(
        name, _flexq_linear(config), fused=True, lm_head=lm_head, experts=functools.partial(random_experts, config)
    )


CONTENDERS = {
    c.name: c
    for c in (
        _flexq("flexq W6A8", LayerConfig()),
        _flexq("flexq W6A6", LayerConfig(act_bits=6)),
        _flexq("flexq W6A8 channel", LayerConfig(scheme="channel")),
        _flexq("flexq W6A8 head", LayerConfig(), lm_head=True),
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


def shape_config(shape: str) -> dict[str, Any]:
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
    return SHAPES[shape]


def has_experts(shape: str) -> bool:
    return "num_experts" in shape_config(shape)


def fits_shape(shape: str, contender: Contender) -> bool:
    """Whether the contender has every kind of layer that a model of this shape has."""
    return not has_experts(shape) or contender.experts is not None or contender.make is _float_linear


def make_model(shape: str, contender: Contender, device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama, or what the shape's model_type says, with random weights on `device`, its linear layers and experts made
    by the contender one by one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 8192} | shape_config(shape)
    config = AutoConfig.for_model(**settings, dtype=dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, linear in linear_layers(model).items():
        replace_module(model, name, contender.make(linear.out_features, linear.in_features, device, dtype))
    if has_experts(shape) and contender.experts is not None:
        sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
        for layer in model.model.layers:
            layer.mlp.experts = contender.experts(*sizes, device, dtype)
    head = contender.make if contender.lm_head else _float_linear
    model.lm_head = head(config.vocab_size, config.hidden_size, device, dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                value = torch.ones if parameter.dim() == 1 else torch.randn
                scale = 0.02 if parameter.dim() == 3 else 1.0  # of experts
                filled = value(parameter.shape, device=device, dtype=dtype) * scale
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    if contender.fused:
        fuse_model(model)
    return model
