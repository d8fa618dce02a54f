"""Weights: rounding them, their codes and scales, and the bytes that kernels read."""

import torch

from flexq import _core
from flexq.execution import stream_for
from flexq.ops.arguments import GROUP_SIZE, WEIGHT_BITS, empty_bytes, num_groups, num_scales, require, weight_desc
from flexq.ops.registering import define


def _fake_quantize_weight(weight, scheme, rotation, weight_bits=6):
    n, k = weight.shape
    planes = weight.new_empty((n, num_groups(k), weight_bits, 16), dtype=torch.uint8)
    return planes, weight.new_empty((n, num_scales(k, scheme)), dtype=torch.float16)


@define(
    "quantize_weight(Tensor weight, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_quantize_weight,
)
def _quantize_weight(weight, scheme, rotation, weight_bits=6):
    require(weight.dim() == 2, f"weight must be [N, K], got {list(weight.shape)}")
    rows = _rows(weight)
    n, k = rows.shape
    desc = weight_desc(n, k, scheme, rotation, weight_bits)
    planes = torch.empty((n, num_groups(k), weight_bits, 16), dtype=torch.uint8, device=rows.device)
    scales = torch.empty((n, num_scales(k, scheme)), dtype=torch.float16, device=rows.device)
    _core.quantize_weight(stream_for(rows.device), desc, rows, planes, scales)
    return planes, scales


def quantize_weight(
    weight: torch.Tensor, scheme: str = "group", rotation: str = "hadamard128", weight_bits: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [N, K] (float32, float16, bfloat16) to canonical planes uint8 [N, G, b, 16] and scales float16.

    Scales are [N, G] for scheme "group", [N, 1] for "channel". Raises ValueError for NaN, Inf and scales that float16
    cannot hold.
    """
    return torch.ops.flexq.quantize_weight(weight, scheme, rotation, weight_bits)


def _fake_dequantize_weight(planes, scales, k, scheme, rotation, dtype):
    return planes.new_empty((planes.shape[0], k), dtype=dtype)


@define(
    "dequantize_weight(Tensor planes, Tensor scales, int k, str scheme, str rotation, ScalarType dtype) -> Tensor",
    _fake_dequantize_weight,
)
def _dequantize_weight(planes, scales, k, scheme, rotation, dtype):
    bits = _check_canonical(planes, scales, k, scheme)
    weight = torch.empty((planes.shape[0], k), dtype=dtype, device="cpu")
    desc = weight_desc(planes.shape[0], k, scheme, rotation, bits)
    host = [t.cpu().contiguous() for t in (planes, scales)]
    _core.dequantize_weight(stream_for(weight.device), desc, *host, weight)
    return weight.to(planes.device)


def dequantize_weight(
    planes: torch.Tensor,
    scales: torch.Tensor,
    k: int,
    scheme: str = "group",
    rotation: str = "hadamard128",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight that canonical planes and scales stand for, its rotation undone.

    Args:
        planes: uint8 [N, G, b, 16], of b-bit codes.
        scales: float16 [N, G] in scheme "group", [N, 1] in "channel".
        k: inputs of the weight, of which G groups of 128 are made.
        scheme, rotation: as it was quantized.
        dtype: float32, float16 or bfloat16.

    Returns:
        [N, K] of `dtype`, on the planes' device.

    Raises:
        ValueError: tensors of other shapes or dtypes.
    """
    return torch.ops.flexq.dequantize_weight(planes, scales, k, scheme, rotation, dtype)


def pack_codes(codes: torch.Tensor, weight_bits: int = 6) -> torch.Tensor:
    """Codes int8 [N, K] of b bits, -2^(b-1) .. 2^(b-1) - 1, K a multiple of 128 -> planes uint8 [N, G, b, 16]."""
    require(
        codes.dtype == torch.int8 and codes.dim() == 2 and codes.shape[1] % GROUP_SIZE == 0 and codes.shape[1] > 0,
        f"codes must be int8 [N, K] with K a multiple of {GROUP_SIZE}, got {codes.dtype} {list(codes.shape)}",
    )
    n, k = codes.shape
    desc = weight_desc(n, k, "group", "none", weight_bits)
    planes = torch.empty((n, k // GROUP_SIZE, weight_bits, 16), dtype=torch.uint8, device=codes.device)
    _core.pack_codes(stream_for(codes.device), desc, codes.contiguous(), planes)
    return planes


def unpack_codes(planes: torch.Tensor) -> torch.Tensor:
    """Planes uint8 [N, G, b, 16] -> codes int8 [N, 128 * G]. CPU tensors."""
    require(
        planes.dtype == torch.uint8
        and planes.dim() == 4
        and planes.shape[1] > 0
        and planes.shape[2] in WEIGHT_BITS
        and planes.shape[3] == 16,
        f"planes must be uint8 [N, G, b, 16], b being 4, 5, 6 or 8, got {planes.dtype} {list(planes.shape)}",
    )
    n, k, bits = planes.shape[0], planes.shape[1] * GROUP_SIZE, planes.shape[2]
    codes = torch.empty((n, k), dtype=torch.int8, device="cpu")
    _core.unpack_codes(stream_for(planes.device), weight_desc(n, k, "group", "none", bits), planes.contiguous(), codes)
    return codes


def _fake_prepack(planes, scales, k, scheme, rotation):
    desc = weight_desc(planes.shape[0], k, scheme, rotation, planes.shape[2])
    return planes.new_empty(_core.prepack_size(stream_for(planes.device), desc))


@define("prepack(Tensor planes, Tensor scales, int k, str scheme, str rotation) -> Tensor", _fake_prepack)
def _prepack(planes, scales, k, scheme, rotation):
    bits = _check_canonical(planes, scales, k, scheme)
    desc = weight_desc(planes.shape[0], k, scheme, rotation, bits)
    stream = stream_for(planes.device)
    packed = empty_bytes(_core.prepack_size(stream, desc), planes)
    _core.prepack(stream, desc, planes.contiguous(), scales.contiguous(), packed)
    return packed


def prepack(planes: torch.Tensor, scales: torch.Tensor, k: int, scheme: str, rotation: str) -> torch.Tensor:
    """Canonical planes and scales -> the bytes that the kernels of their device read.

    Args:
        planes: uint8 [N, G, b, 16], of b-bit codes.
        scales: float16 [N, G] in scheme "group", [N, 1] in "channel", on the same device.
        k: inputs of the weight.
        scheme, rotation: as it was quantized.

    Returns:
        uint8 bytes, in a layout of this device and version: for `linear` and `gemm`, not to be stored.

    Raises:
        ValueError: tensors of other shapes or dtypes.
    """
    return torch.ops.flexq.prepack(planes, scales, k, scheme, rotation)


def _fake_unprepack(packed, n, k, scheme, rotation, weight_bits=6):
    planes = packed.new_empty((n, num_groups(k), weight_bits, 16))
    return planes, packed.new_empty((n, num_scales(k, scheme)), dtype=torch.float16)


@define(
    "unprepack(Tensor packed, int n, int k, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_unprepack,
)
def _unprepack(packed, n, k, scheme, rotation, weight_bits=6):
    desc = weight_desc(n, k, scheme, rotation, weight_bits)
    planes, scales = _fake_unprepack(packed, n, k, scheme, rotation, weight_bits)
    _core.unprepack(stream_for(packed.device), desc, packed, planes, scales)
    return planes, scales


def unprepack(
    packed: torch.Tensor, n: int, k: int, scheme: str, rotation: str, weight_bits: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `prepack`, exact.

    Args:
        packed: uint8 bytes of `prepack` on this device.
        n, k, scheme, rotation, weight_bits: of the weight.

    Returns:
        Planes uint8 [N, G, b, 16] and scales float16 [N, G] or [N, 1], on the same device.

    Raises:
        ValueError: too few bytes for such a weight.
    """
    return torch.ops.flexq.unprepack(packed, n, k, scheme, rotation, weight_bits)


def count_vanished(weight: torch.Tensor, scales: torch.Tensor) -> int:
    """How many scales of a quantized weight [N, K] are 0 though its weights are not: too small for float16."""
    zero = scales == 0
    if not zero.any():
        return 0
    padded = torch.nn.functional.pad(weight.detach(), (0, num_groups(weight.shape[1]) * GROUP_SIZE - weight.shape[1]))
    largest = padded.view(len(padded), scales.shape[1], -1).abs().amax(-1)
    return int((zero.to(largest.device) & (largest > 0)).sum())


def check_scales(scales: torch.Tensor) -> None:
    """ValueError if a weight's scale is NaN, Inf or negative. One pass; on a GPU it waits for the result."""
    bad = ~(torch.isfinite(scales) & (scales >= 0))
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"scales must be finite and not negative, got {scales[row, group].item()} at row {row}, group {group}"
        )


def _check_canonical(planes: torch.Tensor, scales: torch.Tensor, k: int, scheme: str) -> int:
    """The bits of the codes."""
    bits = planes.shape[2] if planes.dim() == 4 else 0
    require(
        planes.dtype == torch.uint8 and bits in WEIGHT_BITS and planes.shape[1:] == (num_groups(k), bits, 16),
        f"planes must be uint8 [N, {num_groups(k)}, b, 16] for K = {k}, b being 4, 5, 6 or 8, got {planes.dtype} "
        f"{list(planes.shape)}",
    )
    expected = (planes.shape[0], num_scales(k, scheme))
    require(
        scales.dtype == torch.float16 and scales.shape == expected,
        f"scales must be float16 {list(expected)} for scheme {scheme}, got {scales.dtype} {list(scales.shape)}",
    )
    return bits


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix with contiguous rows, copied only if its rows are not."""
    matrix = x.detach().reshape(-1, x.shape[-1]) if x.dim() != 2 else x.detach()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()
