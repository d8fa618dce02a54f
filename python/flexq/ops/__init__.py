"""The library's functions as PyTorch operators, `torch.ops.flexq.*`, which `torch.compile` traces.

Shapes: M tokens, N output features, K input features, G = ceil(K / 128) groups. Every operator takes the scale
`scheme` ("group" or "channel") and the `rotation` ("none" or "hadamard128") of the weight, whose codes have
`weight_bits` b of 4, 5, 6 (the default) or 8: planes are uint8 [N, G, b, 16]. The functions here document each one;
errors are `ValueError` (what was given, what is accepted) and `RuntimeError` (the device).
"""

from flexq.ops.arguments import DTYPES, GROUP_SIZE, WEIGHT_BITS, num_groups
from flexq.ops.experts import ExpertsDesc, experts_forward, experts_prepack, experts_unprepack
from flexq.ops.linear_layers import (
    activation_codes,
    gemm,
    linear,
    quantize_activation,
    rms_norm_linear,
    rms_norm_quantize,
    silu_mul_linear,
    silu_mul_quantize,
)
from flexq.ops.weights import (
    check_scales,
    count_vanished,
    dequantize_weight,
    pack_codes,
    prepack,
    quantize_weight,
    unpack_codes,
    unprepack,
)

__all__ = [
    "DTYPES",
    "GROUP_SIZE",
    "WEIGHT_BITS",
    "ExpertsDesc",
    "activation_codes",
    "check_scales",
    "count_vanished",
    "dequantize_weight",
    "experts_forward",
    "experts_prepack",
    "experts_unprepack",
    "gemm",
    "linear",
    "num_groups",
    "pack_codes",
    "prepack",
    "quantize_activation",
    "quantize_weight",
    "rms_norm_linear",
    "rms_norm_quantize",
    "silu_mul_linear",
    "silu_mul_quantize",
    "unpack_codes",
    "unprepack",
]
