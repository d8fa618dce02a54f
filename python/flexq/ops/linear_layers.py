"""Linear layers: quantizing activations, and multiplying them with prepacked weights."""

import torch

from flexq import _core
from flexq.execution import stream_for
from flexq.ops.arguments import (
    GROUP_SIZE,
    activation_desc,
    buffer,
    dtype_of,
    empty_bytes,
    matrix,
    num_groups,
    num_scales,
    require,
    weight_desc,
)
from flexq.ops.registering import define


def _fake_quantize_activation(x, act_bits, scheme, rotation):
    # Of a size that only the backend knows: tracing with symbolic shapes fixes the number of tokens here.
    desc = activation_desc(int(x.numel() // x.shape[-1]), int(x.shape[-1]), act_bits, scheme, rotation)
    return x.new_empty(_core.activation_size(stream_for(x.device), desc), dtype=torch.uint8)


@define("quantize_activation(Tensor x, int act_bits, str scheme, str rotation) -> Tensor", _fake_quantize_activation)
def _quantize_activation(x, act_bits, scheme, rotation):
    x, m, ldx = matrix(x)
    desc = activation_desc(m, x.shape[-1], act_bits, scheme, rotation)
    stream = stream_for(x.device)
    quantized = empty_bytes(_core.activation_size(stream, desc), x)
    _core.quantize_activation(stream, desc, x.data_ptr(), dtype_of("x", x.dtype), ldx, *buffer("quantized", quantized))
    return quantized


def quantize_activation(
    x: torch.Tensor, act_bits: int = 8, scheme: str = "group", rotation: str = "hadamard128"
) -> torch.Tensor:
    """Quantize x to the private form that `gemm` takes; several weights can share it.

    Args:
        x: float32, float16 or bfloat16 [..., K]; rows may be strided.
        act_bits: 6 or 8.
        scheme: "group": a scale per row and 128 inputs; "channel": one per row.
        rotation: "hadamard128" or "none", as the weights were quantized.

    Returns:
        uint8 bytes, codes and scales, in a layout of this device and version.

    Raises:
        ValueError: another dtype or setting.
    """
    return torch.ops.flexq.quantize_activation(x, act_bits, scheme, rotation)


def _fake_rms_norm_quantize(x, residual, weight, eps, act_bits, scheme, rotation):
    return _fake_quantize_activation(x, act_bits, scheme, rotation), torch.empty_like(x)


@define(
    "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float eps, int act_bits, str scheme, str rotation)"
    " -> (Tensor, Tensor)",
    _fake_rms_norm_quantize,
)
def _rms_norm_quantize(x, residual, weight, eps, act_bits, scheme, rotation):
    shape, dtype = x.shape, dtype_of("x", x.dtype)
    x, m, ldx = matrix(x)
    k = shape[-1]
    address, ld_residual = 0, 0
    if residual is not None:
        require(
            residual.shape == shape and residual.dtype == x.dtype and residual.device == x.device,
            f"residual must be like x, {x.dtype} {list(shape)}, got {residual.dtype} {list(residual.shape)}",
        )
        residual, _, ld_residual = matrix(residual)
        address = residual.data_ptr()
    require(
        weight.shape == (k,) and weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous(),
        f"weight must be contiguous {x.dtype} [{k}] on {x.device}, got {weight.dtype} {list(weight.shape)}",
    )
    desc = activation_desc(m, k, act_bits, scheme, rotation)
    stream = stream_for(x.device)
    quantized = empty_bytes(_core.activation_size(stream, desc), x)
    total = torch.empty(shape, dtype=x.dtype, device=x.device)
    _core.rms_norm_quantize(
        stream, desc, x.data_ptr(), ldx, address, ld_residual, weight.data_ptr(), eps, dtype, total.data_ptr(), k,
        *buffer("quantized", quantized),
    )  # fmt: skip
    return quantized, total


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the RMS norm of h = x + residual (h = x without one) in one pass: (quantized, h).

    h / sqrt(mean(h^2) + eps) * weight, each step rounded to x's dtype as separate operations round it. `weight` is [K];
    where a model multiplies by 1 + weight, pass that.
    """
    return torch.ops.flexq.rms_norm_quantize(x, residual, weight, eps, act_bits, scheme, rotation)


def _fake_silu_mul_quantize(gate, up, act_bits, scheme, rotation):
    return _fake_quantize_activation(gate, act_bits, scheme, rotation)


@define(
    "silu_mul_quantize(Tensor gate, Tensor up, int act_bits, str scheme, str rotation) -> Tensor",
    _fake_silu_mul_quantize,
)
def _silu_mul_quantize(gate, up, act_bits, scheme, rotation):
    require(
        up.shape == gate.shape and up.dtype == gate.dtype and up.device == gate.device,
        f"up must be like gate, {gate.dtype} {list(gate.shape)}, got {up.dtype} {list(up.shape)}",
    )
    dtype = dtype_of("gate", gate.dtype)
    gate, m, ld_gate = matrix(gate)
    up, _, ld_up = matrix(up)
    desc = activation_desc(m, gate.shape[-1], act_bits, scheme, rotation)
    stream = stream_for(gate.device)
    quantized = empty_bytes(_core.activation_size(stream, desc), gate)
    _core.silu_mul_quantize(
        stream, desc, gate.data_ptr(), ld_gate, up.data_ptr(), ld_up, dtype, *buffer("quantized", quantized)
    )
    return quantized


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
) -> torch.Tensor:
    """Quantize silu(gate) * up, both [..., K], in one pass; each step is rounded to their dtype."""
    return torch.ops.flexq.silu_mul_quantize(gate, up, act_bits, scheme, rotation)


def _fake_activation_codes(quantized, m, k, act_bits, scheme, rotation):
    codes = quantized.new_empty((m, num_groups(k) * GROUP_SIZE), dtype=torch.int8)
    return codes, quantized.new_empty((m, num_scales(k, scheme)), dtype=torch.float32)


@define(
    "activation_codes(Tensor quantized, int m, int k, int act_bits, str scheme, str rotation) -> (Tensor, Tensor)",
    _fake_activation_codes,
)
def _activation_codes(quantized, m, k, act_bits, scheme, rotation):
    codes, scales = _fake_activation_codes(quantized, m, k, act_bits, scheme, rotation)
    desc = activation_desc(m, k, act_bits, scheme, rotation)
    _core.activation_export(stream_for(quantized.device), desc, quantized, codes, scales)
    return codes, scales


def activation_codes(
    quantized: torch.Tensor, m: int, k: int, act_bits: int, scheme: str, rotation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_activation` made, in plain form: codes int8 [M, 128 * G], scales float32 [M, G] or [M, 1]."""
    return torch.ops.flexq.activation_codes(quantized, m, k, act_bits, scheme, rotation)


def _fake_gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits=6):
    return packed.new_empty((m, n), dtype=dtype)


@define(
    "gemm(Tensor quantized, Tensor packed, Tensor? bias, SymInt m, int n, int k, int act_bits, str scheme,"
    " str rotation, ScalarType dtype, int weight_bits=6) -> Tensor",
    _fake_gemm,
)
def _gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits=6):
    device = packed.device
    require(quantized.device == device, f"the activation is on {quantized.device}, the weight on {device}")
    desc = weight_desc(n, k, scheme, rotation, weight_bits)
    act_desc = activation_desc(m, k, act_bits, scheme, rotation)
    stream = stream_for(device)
    y = torch.empty((m, n), dtype=dtype, device=device)
    workspace = empty_bytes(_core.gemm_workspace_size(stream, desc, act_bits, m), packed)
    out = y.data_ptr(), dtype_of("dtype", dtype), n
    buffers = buffer("packed", packed), buffer("quantized", quantized)
    _core.gemm(
        stream,
        desc,
        *buffers[0],
        act_desc,
        *buffers[1],
        *_bias(bias, n, device),
        *out,
        *buffer("workspace", workspace),
    )
    return y


def gemm(
    quantized: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    n: int,
    k: int,
    act_bits: int,
    scheme: str,
    rotation: str,
    dtype: torch.dtype = torch.float32,
    weight_bits: int = 6,
) -> torch.Tensor:
    """A quantized activation times a prepacked weight.

    Args:
        quantized: uint8 bytes of `quantize_activation`, of x [M, K], with the same bits, scheme and rotation.
        packed: uint8 bytes of `prepack`, of a weight [N, K], on the same device.
        bias: [N] of `dtype`, or None.
        m, n, k: rows of x, rows and inputs of the weight.
        act_bits, scheme, rotation, weight_bits: as both were quantized.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [M, N] of `dtype`.

    Raises:
        ValueError: too few bytes for such operands, another dtype, other devices.
    """
    return torch.ops.flexq.gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits)


def _fake_linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return x.new_empty((*x.shape[:-1], n))


@define(
    "linear(Tensor x, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits=6)"
    " -> Tensor",
    _fake_linear,
)
def _linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    device = x.device
    require(packed.device == device, f"x is on {device}, the weight on {packed.device}")
    shape = x.shape
    x, m, ldx = matrix(x)
    desc = weight_desc(n, shape[-1], scheme, rotation, weight_bits)
    stream = stream_for(device)
    dtype = dtype_of("x", x.dtype)
    y = x.new_empty((*shape[:-1], n))
    workspace = empty_bytes(_core.linear_workspace_size(stream, desc, act_bits, m), x)
    _core.linear(
        stream, desc, *buffer("packed", packed), act_bits, m, x.data_ptr(), dtype, ldx, *_bias(bias, n, device),
        y.data_ptr(), dtype, n, workspace.data_ptr(), workspace.numel(),
    )  # fmt: skip
    return y


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
    weight_bits: int = 6,
) -> torch.Tensor:
    """x W^T + bias through a prepacked weight, x quantized on the way.

    Args:
        x: float32, float16 or bfloat16 [..., K]; rows may be strided.
        packed: uint8 bytes of `prepack`, of W [N, K], on x's device.
        bias: [N] of x's dtype, or None.
        n: rows of W.
        act_bits: 6 or 8, of x.
        scheme, rotation, weight_bits: as W was quantized.

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: another dtype or setting, too few bytes for such a weight, other devices.
    """
    return torch.ops.flexq.linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits)


def _fake_rms_norm_linear(x, residual, norm_weight, eps, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(x.shape)


@define(
    "rms_norm_linear(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor packed, Tensor? bias, int n,"
    " int act_bits, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_rms_norm_linear,
)
def _rms_norm_linear(x, residual, norm_weight, eps, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    quantized, total = _rms_norm_quantize(x, residual, norm_weight, eps, act_bits, scheme, rotation)
    k = x.shape[-1]
    y = _gemm(quantized, packed, bias, x.numel() // k, n, k, act_bits, scheme, rotation, x.dtype, weight_bits)
    return y.view(*x.shape[:-1], n), total


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
    weight_bits: int = 6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_quantize` and `gemm` in one call: x [..., K] -> (y [..., N] of x's dtype, h [..., K]).

    Its shapes do not depend on the device, so that graphs can hold it for any number of tokens.
    """
    return torch.ops.flexq.rms_norm_linear(
        x, residual, norm_weight, eps, packed, bias, n, act_bits, scheme, rotation, weight_bits
    )


def _fake_silu_mul_linear(gate_up, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return gate_up.new_empty((*gate_up.shape[:-1], n))


@define(
    "silu_mul_linear(Tensor gate_up, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation,"
    " int weight_bits=6) -> Tensor",
    _fake_silu_mul_linear,
)
def _silu_mul_linear(gate_up, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    require(
        gate_up.dim() > 0 and gate_up.shape[-1] > 0 and gate_up.shape[-1] % 2 == 0,
        f"gate_up must be [..., 2K] with K at least 1, got {list(gate_up.shape)}",
    )
    dtype_of("gate_up", gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    quantized = _silu_mul_quantize(gate, up, act_bits, scheme, rotation)
    m, k = gate.numel() // gate.shape[-1], gate.shape[-1]
    y = _gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, gate.dtype, weight_bits)
    return y.view(*gate.shape[:-1], n)


def silu_mul_linear(
    gate_up: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
    weight_bits: int = 6,
) -> torch.Tensor:
    """`silu_mul_quantize` and `gemm` in one call: gate_up [..., 2K], the gate first -> [..., N] of its dtype.

    Its shapes do not depend on the device, so that graphs can hold it for any number of tokens.
    """
    return torch.ops.flexq.silu_mul_linear(gate_up, packed, bias, n, act_bits, scheme, rotation, weight_bits)


def _bias(bias: torch.Tensor | None, n: int, device: torch.device) -> tuple[int, int]:
    """Address and dtype."""
    if bias is None:
        return 0, 0
    if bias.shape != (n,) or not bias.is_contiguous() or bias.device != device:
        raise ValueError(f"bias must be contiguous [{n}] on {device}, got {list(bias.shape)} on {bias.device}")
    return bias.data_ptr(), dtype_of("bias", bias.dtype)
