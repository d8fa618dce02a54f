"""The library's functions as PyTorch operators, `torch.ops.flexq.*`, which `torch.compile` traces.

Shapes: M tokens, N output features, K input features, G = ceil(K / 128) groups. Every operator takes the scale
`scheme` ("group" or "channel") and the `rotation` ("none" or "hadamard128") of the weight, whose codes have
`weight_bits` b of 4, 5, 6 (the default) or 8: planes are uint8 [N, G, b, 16]. The wrappers below document each one;
errors are `ValueError` (what was given, what is accepted) and `RuntimeError` (the device).
"""

import functools
from typing import NamedTuple

import torch

from flexq import _core
from flexq.execution import stream_for

GROUP_SIZE = _core.GROUP_SIZE
WEIGHT_BITS = (4, 5, 6, 8)

_library = torch.library.Library("flexq", "DEF")
_DEVICES = ("CPU", "CUDA")


@functools.lru_cache(maxsize=4096)
def _weight_desc(n: int, k: int, scheme: str, rotation: str, weight_bits: int) -> _core.WeightDesc:
    return _core.WeightDesc(n, k, scheme, rotation, weight_bits)


@functools.lru_cache(maxsize=4096)
def _activation_desc(m: int, k: int, act_bits: int, scheme: str, rotation: str) -> _core.ActivationDesc:
    return _core.ActivationDesc(m, k, act_bits, scheme, rotation)


def num_groups(k: int) -> int:
    return -(-k // GROUP_SIZE)


def _num_scales(k: int, scheme: str) -> int:
    return num_groups(k) if scheme == "group" else 1


def _bytes(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix with contiguous rows, copied only if its rows are not."""
    matrix = x.detach().reshape(-1, x.shape[-1]) if x.dim() != 2 else x.detach()
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


# Of activations, by their numbers in the C API.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _dtype(name: str, dtype: torch.dtype) -> int:
    try:
        return DTYPES[dtype]
    except KeyError:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}") from None


def _buffer(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of a uint8 tensor."""
    if tensor.dtype != torch.uint8 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous uint8, got {tensor.dtype} with strides {list(tensor.stride())}")
    return tensor.data_ptr(), tensor.numel()


def _matrix(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [..., K] as a tensor with contiguous rows (copied only if it has none), its number of rows and their stride."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., K] with K at least 1, got {list(x.shape)}")
    k = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // k, k
    try:
        rows = x.view(-1, k)
    except RuntimeError:
        rows = x
    if rows.dim() == 2 and rows.stride(1) == 1 and rows.stride(0) >= k:
        return rows, rows.shape[0], rows.stride(0)
    return x.contiguous(), x.numel() // k, k


def _bias(bias: torch.Tensor | None, n: int, device: torch.device) -> tuple[int, int]:
    """Address and dtype."""
    if bias is None:
        return 0, 0
    if bias.shape != (n,) or not bias.is_contiguous() or bias.device != device:
        raise ValueError(f"bias must be contiguous [{n}] on {device}, got {list(bias.shape)} on {bias.device}")
    return bias.data_ptr(), _dtype("bias", bias.dtype)


def _check_canonical(planes: torch.Tensor, scales: torch.Tensor, k: int, scheme: str) -> int:
    """The bits of the codes."""
    bits = planes.shape[2] if planes.dim() == 4 else 0
    _require(
        planes.dtype == torch.uint8 and bits in WEIGHT_BITS and planes.shape[1:] == (num_groups(k), bits, 16),
        f"planes must be uint8 [N, {num_groups(k)}, b, 16] for K = {k}, b being 4, 5, 6 or 8, got {planes.dtype} "
        f"{list(planes.shape)}",
    )
    expected = (planes.shape[0], _num_scales(k, scheme))
    _require(
        scales.dtype == torch.float16 and scales.shape == expected,
        f"scales must be float16 {list(expected)} for scheme {scheme}, got {scales.dtype} {list(scales.shape)}",
    )
    return bits


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


def _define(schema: str, fake):
    """Registers the decorated function for every device that has no kernel in C++ for it, and `fake` for tracing."""

    def register(function):
        name = _library.define(schema)
        for device in _DEVICES:
            if not _core.implement_operator(name, device):
                _library.impl(name, function, device)
        torch.library.register_fake(f"flexq::{name}", _only_for_tracing(name, fake), lib=_library)
        return function

    return register


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _fake_quantize_weight(weight, scheme, rotation, weight_bits=6):
    n, k = weight.shape
    planes = weight.new_empty((n, num_groups(k), weight_bits, 16), dtype=torch.uint8)
    return planes, weight.new_empty((n, _num_scales(k, scheme)), dtype=torch.float16)


@_define(
    "quantize_weight(Tensor weight, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_quantize_weight,
)
def _quantize_weight(weight, scheme, rotation, weight_bits=6):
    _require(weight.dim() == 2, f"weight must be [N, K], got {list(weight.shape)}")
    rows = _rows(weight)
    n, k = rows.shape
    desc = _weight_desc(n, k, scheme, rotation, weight_bits)
    planes = torch.empty((n, num_groups(k), weight_bits, 16), dtype=torch.uint8, device=rows.device)
    scales = torch.empty((n, _num_scales(k, scheme)), dtype=torch.float16, device=rows.device)
    _core.quantize_weight(stream_for(rows.device), desc, rows, planes, scales)
    return planes, scales


def _fake_dequantize_weight(planes, scales, k, scheme, rotation, dtype):
    return planes.new_empty((planes.shape[0], k), dtype=dtype)


@_define(
    "dequantize_weight(Tensor planes, Tensor scales, int k, str scheme, str rotation, ScalarType dtype) -> Tensor",
    _fake_dequantize_weight,
)
def _dequantize_weight(planes, scales, k, scheme, rotation, dtype):
    bits = _check_canonical(planes, scales, k, scheme)
    weight = torch.empty((planes.shape[0], k), dtype=dtype)
    desc = _weight_desc(planes.shape[0], k, scheme, rotation, bits)
    host = [t.cpu().contiguous() for t in (planes, scales)]
    _core.dequantize_weight(stream_for(weight.device), desc, *host, weight)
    return weight.to(planes.device)


def _fake_prepack(planes, scales, k, scheme, rotation):
    desc = _weight_desc(planes.shape[0], k, scheme, rotation, planes.shape[2])
    return planes.new_empty(_core.prepack_size(stream_for(planes.device), desc))


@_define("prepack(Tensor planes, Tensor scales, int k, str scheme, str rotation) -> Tensor", _fake_prepack)
def _prepack(planes, scales, k, scheme, rotation):
    bits = _check_canonical(planes, scales, k, scheme)
    desc = _weight_desc(planes.shape[0], k, scheme, rotation, bits)
    stream = stream_for(planes.device)
    packed = _bytes(_core.prepack_size(stream, desc), planes)
    _core.prepack(stream, desc, planes.contiguous(), scales.contiguous(), packed)
    return packed


def _fake_unprepack(packed, n, k, scheme, rotation, weight_bits=6):
    planes = packed.new_empty((n, num_groups(k), weight_bits, 16))
    return planes, packed.new_empty((n, _num_scales(k, scheme)), dtype=torch.float16)


@_define(
    "unprepack(Tensor packed, int n, int k, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_unprepack,
)
def _unprepack(packed, n, k, scheme, rotation, weight_bits=6):
    desc = _weight_desc(n, k, scheme, rotation, weight_bits)
    planes, scales = _fake_unprepack(packed, n, k, scheme, rotation, weight_bits)
    _core.unprepack(stream_for(packed.device), desc, packed, planes, scales)
    return planes, scales


# ---- Activations and linear ------------------------------------------------------------------------------------------


def _fake_quantize_activation(x, act_bits, scheme, rotation):
    # Of a size that only the backend knows: tracing with symbolic shapes fixes the number of tokens here.
    desc = _activation_desc(int(x.numel() // x.shape[-1]), int(x.shape[-1]), act_bits, scheme, rotation)
    return x.new_empty(_core.activation_size(stream_for(x.device), desc), dtype=torch.uint8)


@_define("quantize_activation(Tensor x, int act_bits, str scheme, str rotation) -> Tensor", _fake_quantize_activation)
def _quantize_activation(x, act_bits, scheme, rotation):
    x, m, ldx = _matrix(x)
    desc = _activation_desc(m, x.shape[-1], act_bits, scheme, rotation)
    stream = stream_for(x.device)
    quantized = _bytes(_core.activation_size(stream, desc), x)
    _core.quantize_activation(stream, desc, x.data_ptr(), _dtype("x", x.dtype), ldx, *_buffer("quantized", quantized))
    return quantized


def _fake_rms_norm_quantize(x, residual, weight, eps, act_bits, scheme, rotation):
    return _fake_quantize_activation(x, act_bits, scheme, rotation), torch.empty_like(x)


@_define(
    "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float eps, int act_bits, str scheme, str rotation)"
    " -> (Tensor, Tensor)",
    _fake_rms_norm_quantize,
)
def _rms_norm_quantize(x, residual, weight, eps, act_bits, scheme, rotation):
    shape, dtype = x.shape, _dtype("x", x.dtype)
    x, m, ldx = _matrix(x)
    k = shape[-1]
    address, ld_residual = 0, 0
    if residual is not None:
        _require(
            residual.shape == shape and residual.dtype == x.dtype and residual.device == x.device,
            f"residual must be like x, {x.dtype} {list(shape)}, got {residual.dtype} {list(residual.shape)}",
        )
        residual, _, ld_residual = _matrix(residual)
        address = residual.data_ptr()
    _require(
        weight.shape == (k,) and weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous(),
        f"weight must be contiguous {x.dtype} [{k}] on {x.device}, got {weight.dtype} {list(weight.shape)}",
    )
    desc = _activation_desc(m, k, act_bits, scheme, rotation)
    stream = stream_for(x.device)
    quantized = _bytes(_core.activation_size(stream, desc), x)
    total = torch.empty(shape, dtype=x.dtype, device=x.device)
    _core.rms_norm_quantize(
        stream, desc, x.data_ptr(), ldx, address, ld_residual, weight.data_ptr(), eps, dtype, total.data_ptr(), k,
        *_buffer("quantized", quantized),
    )  # fmt: skip
    return quantized, total


def _fake_silu_mul_quantize(gate, up, act_bits, scheme, rotation):
    return _fake_quantize_activation(gate, act_bits, scheme, rotation)


@_define(
    "silu_mul_quantize(Tensor gate, Tensor up, int act_bits, str scheme, str rotation) -> Tensor",
    _fake_silu_mul_quantize,
)
def _silu_mul_quantize(gate, up, act_bits, scheme, rotation):
    _require(
        up.shape == gate.shape and up.dtype == gate.dtype and up.device == gate.device,
        f"up must be like gate, {gate.dtype} {list(gate.shape)}, got {up.dtype} {list(up.shape)}",
    )
    dtype = _dtype("gate", gate.dtype)
    gate, m, ld_gate = _matrix(gate)
    up, _, ld_up = _matrix(up)
    desc = _activation_desc(m, gate.shape[-1], act_bits, scheme, rotation)
    stream = stream_for(gate.device)
    quantized = _bytes(_core.activation_size(stream, desc), gate)
    _core.silu_mul_quantize(
        stream, desc, gate.data_ptr(), ld_gate, up.data_ptr(), ld_up, dtype, *_buffer("quantized", quantized)
    )
    return quantized


def _fake_activation_codes(quantized, m, k, act_bits, scheme, rotation):
    codes = quantized.new_empty((m, num_groups(k) * GROUP_SIZE), dtype=torch.int8)
    return codes, quantized.new_empty((m, _num_scales(k, scheme)), dtype=torch.float32)


@_define(
    "activation_codes(Tensor quantized, int m, int k, int act_bits, str scheme, str rotation) -> (Tensor, Tensor)",
    _fake_activation_codes,
)
def _activation_codes(quantized, m, k, act_bits, scheme, rotation):
    codes, scales = _fake_activation_codes(quantized, m, k, act_bits, scheme, rotation)
    desc = _activation_desc(m, k, act_bits, scheme, rotation)
    _core.activation_export(stream_for(quantized.device), desc, quantized, codes, scales)
    return codes, scales


def _fake_gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits=6):
    return packed.new_empty((m, n), dtype=dtype)


@_define(
    "gemm(Tensor quantized, Tensor packed, Tensor? bias, SymInt m, int n, int k, int act_bits, str scheme,"
    " str rotation, ScalarType dtype, int weight_bits=6) -> Tensor",
    _fake_gemm,
)
def _gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits=6):
    device = packed.device
    _require(quantized.device == device, f"the activation is on {quantized.device}, the weight on {device}")
    desc = _weight_desc(n, k, scheme, rotation, weight_bits)
    act_desc = _activation_desc(m, k, act_bits, scheme, rotation)
    stream = stream_for(device)
    y = torch.empty((m, n), dtype=dtype, device=device)
    workspace = _bytes(_core.gemm_workspace_size(stream, desc, act_bits, m), packed)
    out = y.data_ptr(), _dtype("dtype", dtype), n
    buffers = _buffer("packed", packed), _buffer("quantized", quantized)
    _core.gemm(
        stream,
        desc,
        *buffers[0],
        act_desc,
        *buffers[1],
        *_bias(bias, n, device),
        *out,
        *_buffer("workspace", workspace),
    )
    return y


def _fake_linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return x.new_empty((*x.shape[:-1], n))


@_define(
    "linear(Tensor x, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits=6)"
    " -> Tensor",
    _fake_linear,
)
def _linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    device = x.device
    _require(packed.device == device, f"x is on {device}, the weight on {packed.device}")
    shape = x.shape
    x, m, ldx = _matrix(x)
    desc = _weight_desc(n, shape[-1], scheme, rotation, weight_bits)
    stream = stream_for(device)
    dtype = _dtype("x", x.dtype)
    y = x.new_empty((*shape[:-1], n))
    workspace = _bytes(_core.linear_workspace_size(stream, desc, act_bits, m), x)
    _core.linear(
        stream, desc, *_buffer("packed", packed), act_bits, m, x.data_ptr(), dtype, ldx, *_bias(bias, n, device),
        y.data_ptr(), dtype, n, workspace.data_ptr(), workspace.numel(),
    )  # fmt: skip
    return y


def _fake_rms_norm_linear(x, residual, norm_weight, eps, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(x.shape)


@_define(
    "rms_norm_linear(Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor packed, Tensor? bias, int n,"
    " int act_bits, str scheme, str rotation, int weight_bits=6) -> (Tensor, Tensor)",
    _fake_rms_norm_linear,
)
def _rms_norm_linear(x, residual, norm_weight, eps, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    quantized, total = _rms_norm_quantize(x, residual, norm_weight, eps, act_bits, scheme, rotation)
    k = x.shape[-1]
    y = _gemm(quantized, packed, bias, x.numel() // k, n, k, act_bits, scheme, rotation, x.dtype, weight_bits)
    return y.view(*x.shape[:-1], n), total


def _fake_silu_mul_linear(gate_up, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    return gate_up.new_empty((*gate_up.shape[:-1], n))


@_define(
    "silu_mul_linear(Tensor gate_up, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation,"
    " int weight_bits=6) -> Tensor",
    _fake_silu_mul_linear,
)
def _silu_mul_linear(gate_up, packed, bias, n, act_bits, scheme, rotation, weight_bits=6):
    _require(
        gate_up.dim() > 0 and gate_up.shape[-1] > 0 and gate_up.shape[-1] % 2 == 0,
        f"gate_up must be [..., 2K] with K at least 1, got {list(gate_up.shape)}",
    )
    _dtype("gate_up", gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    quantized = _silu_mul_quantize(gate, up, act_bits, scheme, rotation)
    m, k = gate.numel() // gate.shape[-1], gate.shape[-1]
    y = _gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, gate.dtype, weight_bits)
    return y.view(*gate.shape[:-1], n)


# ---- Experts ---------------------------------------------------------------------------------------------------------


class ExpertsDesc(NamedTuple):
    """The experts of a mixture-of-experts layer: E of them, and what each computes,

    h = f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset), with gate and up the two halves of gate_up(x).

    Args:
        experts: E.
        hidden: H, features of the layer's input and output.
        intermediate: I, features of h; gate_up is [2I, H], down [H, I].
        gate_up_scheme, gate_up_rotation, gate_up_act_bits: of the first projection and its activations.
        down_scheme, down_rotation, down_act_bits: of the second.
        function: f, "silu" (g * sigmoid(alpha * g)), "gelu" or "gelu_tanh".
        alpha: of silu. 1.702 in gpt-oss.
        limit: 0 for none. 7 in gpt-oss.
        up_offset: 1 in gpt-oss.
        interleaved: rows of gate_up are gate 0, up 0, gate 1, ... instead of I of the gate and then I of up.
        gate_up_weight_bits, down_weight_bits: of the codes of each projection, 4, 5, 6 or 8.
    """

    experts: int
    hidden: int
    intermediate: int
    gate_up_scheme: str = "group"
    gate_up_rotation: str = "hadamard128"
    gate_up_act_bits: int = 8
    down_scheme: str = "group"
    down_rotation: str = "hadamard128"
    down_act_bits: int = 8
    function: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0
    interleaved: bool = False
    gate_up_weight_bits: int = 6
    down_weight_bits: int = 6

    def shape(self, projection: str) -> tuple[int, int]:
        """[N, K] of an expert's "gate_up" or "down"."""
        return (2 * self.intermediate, self.hidden) if projection == "gate_up" else (self.hidden, self.intermediate)

    def scheme(self, projection: str) -> str:
        return self.gate_up_scheme if projection == "gate_up" else self.down_scheme

    def weight_bits(self, projection: str) -> int:
        return self.gate_up_weight_bits if projection == "gate_up" else self.down_weight_bits


_EXPERTS = (
    "int experts, int hidden, int intermediate, str gate_up_scheme, str gate_up_rotation, int gate_up_act_bits,"
    " str down_scheme, str down_rotation, int down_act_bits, str function, float alpha, float limit, float up_offset,"
    " bool interleaved, int gate_up_weight_bits, int down_weight_bits"
)
_INDEX_TYPES = {torch.int32: False, torch.int64: True}


@functools.lru_cache(maxsize=4096)
def _experts_desc(*desc) -> _core.ExpertsDesc:
    return _core.ExpertsDesc(*desc)


def _fake_experts_prepack(planes, scales, projection, *desc):
    return planes.new_empty(
        _core.experts_prepack_size(stream_for(planes.device), _experts_desc(*desc), projection), dtype=torch.uint8
    )


@_define(
    f"experts_prepack(Tensor planes, Tensor scales, str projection, {_EXPERTS}) -> Tensor",
    _fake_experts_prepack,
)
def _experts_prepack(planes, scales, projection, *desc):
    stream, native = stream_for(planes.device), _experts_desc(*desc)
    packed = _bytes(_core.experts_prepack_size(stream, native, projection), planes)
    given = ExpertsDesc(*desc)
    (n, k), scheme = given.shape(projection), given.scheme(projection)
    expected = (given.experts, n, num_groups(k), given.weight_bits(projection), 16)
    _require(
        planes.dtype == torch.uint8 and planes.shape == expected,
        f"planes of {projection} must be uint8 {list(expected)}, got {planes.dtype} {list(planes.shape)}",
    )
    expected = (given.experts, n, _num_scales(k, scheme))
    _require(
        scales.dtype == torch.float16 and scales.shape == expected,
        f"scales of {projection} must be float16 {list(expected)} for scheme {scheme}, got {scales.dtype} "
        f"{list(scales.shape)}",
    )
    _core.experts_prepack(stream, native, projection, planes.contiguous(), scales.contiguous(), packed)
    return packed


def _fake_experts_unprepack(packed, projection, *desc):
    given = ExpertsDesc(*desc)
    n, k = given.shape(projection)
    planes = packed.new_empty((given.experts, n, num_groups(k), given.weight_bits(projection), 16), dtype=torch.uint8)
    return planes, packed.new_empty((given.experts, n, _num_scales(k, given.scheme(projection))), dtype=torch.float16)


@_define(
    f"experts_unprepack(Tensor packed, str projection, {_EXPERTS}) -> (Tensor, Tensor)",
    _fake_experts_unprepack,
)
def _experts_unprepack(packed, projection, *desc):
    native = _experts_desc(*desc)
    planes, scales = _fake_experts_unprepack(packed, projection, *desc)
    _core.experts_unprepack(stream_for(packed.device), native, projection, packed, planes, scales)
    return planes, scales


def _expert_bias(name: str, bias: torch.Tensor | None, experts: int, n: int, device: torch.device) -> tuple[int, int]:
    """Address and dtype."""
    if bias is None:
        return 0, 0
    if bias.shape != (experts, n) or not bias.is_contiguous() or bias.device != device:
        raise ValueError(
            f"{name} must be contiguous [{experts}, {n}] on {device}, got {list(bias.shape)} on {bias.device}"
        )
    return bias.data_ptr(), _dtype(name, bias.dtype)


def _fake_experts_forward(x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc):
    return x.new_empty(x.shape)


@_define(
    "experts_forward(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias,"
    f" Tensor? down_bias, Tensor? expert_map, bool weights_on_input, {_EXPERTS}) -> Tensor",
    _fake_experts_forward,
)
def _experts_forward(x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc):
    device, shape = x.device, x.shape
    dtype = _dtype("x", x.dtype)
    native, given = _experts_desc(*desc), ExpertsDesc(*desc)
    x, m, ldx = _matrix(x)
    _require(shape[-1] == given.hidden, f"x must be [..., {given.hidden}], got {list(shape)}")
    _require(
        ids.dtype in _INDEX_TYPES and ids.dim() > 0 and ids.shape[:-1] == shape[:-1] and ids.shape[-1] > 0,
        f"ids must be int32 or int64 {[*shape[:-1], 'top_k']}, got {ids.dtype} {list(ids.shape)}",
    )
    _require(weights.shape == ids.shape, f"weights must be like ids, {list(ids.shape)}, got {list(weights.shape)}")
    weights_dtype = _dtype("weights", weights.dtype)
    if expert_map is not None:
        _require(
            expert_map.dtype == torch.int32 and expert_map.dim() == 1 and expert_map.is_contiguous(),
            f"expert_map must be contiguous int32 [experts everywhere], got {expert_map.dtype} "
            f"{list(expert_map.shape)}",
        )
    for name, tensor in (
        ("ids", ids), ("weights", weights), ("gate_up", gate_up), ("down", down), ("expert_map", expert_map),
    ):  # fmt: skip
        _require(tensor is None or tensor.device == device, f"x is on {device}, {name} not")
    up_bias = _expert_bias("gate_up_bias", gate_up_bias, given.experts, 2 * given.intermediate, device)
    out_bias = _expert_bias("down_bias", down_bias, given.experts, given.hidden, device)
    _require(
        gate_up_bias is None or down_bias is None or up_bias[1] == out_bias[1],
        "gate_up_bias and down_bias must have the same dtype",
    )
    ids, weights = ids.contiguous(), weights.contiguous()
    stream, top_k = stream_for(device), ids.shape[-1]
    y = x.new_empty(shape)
    workspace = _bytes(_core.experts_workspace_size(stream, native, m, top_k, dtype), x)
    _core.experts_forward(
        stream, native, *_buffer("gate_up", gate_up), *_buffer("down", down), m, top_k, ids.data_ptr(),
        _INDEX_TYPES[ids.dtype], weights.data_ptr(), weights_dtype,
        0 if expert_map is None else expert_map.data_ptr(), 0 if expert_map is None else expert_map.numel(),
        weights_on_input, x.data_ptr(), dtype, ldx, up_bias[0], out_bias[0], max(up_bias[1], out_bias[1]),
        y.data_ptr(), dtype, given.hidden, workspace.data_ptr(), workspace.numel(),
    )  # fmt: skip
    return y


# ---- What Python callers use -----------------------------------------------------------------------------------------


def quantize_weight(
    weight: torch.Tensor, scheme: str = "group", rotation: str = "hadamard128", weight_bits: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [N, K] (float32, float16, bfloat16) to canonical planes uint8 [N, G, b, 16] and scales float16.

    Scales are [N, G] for scheme "group", [N, 1] for "channel". Raises ValueError for NaN, Inf and scales that float16
    cannot hold.
    """
    return torch.ops.flexq.quantize_weight(weight, scheme, rotation, weight_bits)


def dequantize_weight(
    planes: torch.Tensor,
    scales: torch.Tensor,
    k: int,
    scheme: str = "group",
    rotation: str = "hadamard128",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight [N, K] that canonical planes and scales stand for, its rotation undone."""
    return torch.ops.flexq.dequantize_weight(planes, scales, k, scheme, rotation, dtype)


def pack_codes(codes: torch.Tensor, weight_bits: int = 6) -> torch.Tensor:
    """Codes int8 [N, K] of b bits, -2^(b-1) .. 2^(b-1) - 1, K a multiple of 128 -> planes uint8 [N, G, b, 16]."""
    _require(
        codes.dtype == torch.int8 and codes.dim() == 2 and codes.shape[1] % GROUP_SIZE == 0 and codes.shape[1] > 0,
        f"codes must be int8 [N, K] with K a multiple of {GROUP_SIZE}, got {codes.dtype} {list(codes.shape)}",
    )
    n, k = codes.shape
    desc = _weight_desc(n, k, "group", "none", weight_bits)
    planes = torch.empty((n, k // GROUP_SIZE, weight_bits, 16), dtype=torch.uint8, device=codes.device)
    _core.pack_codes(stream_for(codes.device), desc, codes.contiguous(), planes)
    return planes


def unpack_codes(planes: torch.Tensor) -> torch.Tensor:
    """Planes uint8 [N, G, b, 16] -> codes int8 [N, 128 * G]. CPU tensors."""
    _require(
        planes.dtype == torch.uint8
        and planes.dim() == 4
        and planes.shape[1] > 0
        and planes.shape[2] in WEIGHT_BITS
        and planes.shape[3] == 16,
        f"planes must be uint8 [N, G, b, 16], b being 4, 5, 6 or 8, got {planes.dtype} {list(planes.shape)}",
    )
    n, k, bits = planes.shape[0], planes.shape[1] * GROUP_SIZE, planes.shape[2]
    codes = torch.empty((n, k), dtype=torch.int8)
    _core.unpack_codes(stream_for(planes.device), _weight_desc(n, k, "group", "none", bits), planes.contiguous(), codes)
    return codes


def prepack(planes: torch.Tensor, scales: torch.Tensor, k: int, scheme: str, rotation: str) -> torch.Tensor:
    """Canonical planes and scales -> the bytes that the kernels of their device read."""
    return torch.ops.flexq.prepack(planes, scales, k, scheme, rotation)


def unprepack(
    packed: torch.Tensor, n: int, k: int, scheme: str, rotation: str, weight_bits: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `prepack`, exact."""
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


def quantize_activation(
    x: torch.Tensor, act_bits: int = 8, scheme: str = "group", rotation: str = "hadamard128"
) -> torch.Tensor:
    """Quantize x [..., K] to the private form (uint8 bytes) that `gemm` takes; several weights can share it."""
    return torch.ops.flexq.quantize_activation(x, act_bits, scheme, rotation)


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


def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    act_bits: int = 8,
    scheme: str = "group",
    rotation: str = "hadamard128",
) -> torch.Tensor:
    """Quantize silu(gate) * up, both [..., K], in one pass; each step is rounded to their dtype."""
    return torch.ops.flexq.silu_mul_quantize(gate, up, act_bits, scheme, rotation)


def activation_codes(
    quantized: torch.Tensor, m: int, k: int, act_bits: int, scheme: str, rotation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_activation` made, in plain form: codes int8 [M, 128 * G], scales float32 [M, G] or [M, 1]."""
    return torch.ops.flexq.activation_codes(quantized, m, k, act_bits, scheme, rotation)


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
    """quantized [M, K] x packed [N, K]^T + bias [N] -> [M, N] of `dtype`."""
    return torch.ops.flexq.gemm(quantized, packed, bias, m, n, k, act_bits, scheme, rotation, dtype, weight_bits)


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
    """x [..., K] (float32, float16, bfloat16) -> [..., N] of x's dtype, through a prepacked weight [N, K]."""
    return torch.ops.flexq.linear(x, packed, bias, n, act_bits, scheme, rotation, weight_bits)


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


def experts_prepack(planes: torch.Tensor, scales: torch.Tensor, projection: str, desc: ExpertsDesc) -> torch.Tensor:
    """One projection ("gate_up" or "down") of all experts: canonical planes uint8 [E, N, G, b, 16] and scales float16
    [E, N, G] or [E, N, 1] -> the bytes that the kernels of their device read."""
    return torch.ops.flexq.experts_prepack(planes, scales, projection, *desc)


def experts_unprepack(packed: torch.Tensor, projection: str, desc: ExpertsDesc) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `experts_prepack`, exact."""
    return torch.ops.flexq.experts_unprepack(packed, projection, *desc)


def experts_forward(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    desc: ExpertsDesc,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    weights_on_input: bool = False,
) -> torch.Tensor:
    """x [..., H] through each token's experts `ids` [..., top_k] (int32, int64), added up by the router's `weights`.

    `gate_up` and `down` are prepacked; biases are [E, 2I] and [E, H]. With an `expert_map`, int32 [experts everywhere],
    ids are indices of it, and it has the local index of each or -1: what is not here adds nothing. ValueError for other
    ids on the CPU; on a GPU they add nothing either. `weights_on_input` multiplies the inputs by the router's weights
    instead of the outputs. Returns [..., H] of x's dtype.
    """
    return torch.ops.flexq.experts_forward(
        x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc
    )
