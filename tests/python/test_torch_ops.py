"""The operators' C++ kernels against their implementations in Python, which older versions of PyTorch use."""

import flexq
import pytest
import torch
from flexq import _core, ops
from flexq.experts import Experts
from flexq.ops import experts as experts_ops
from flexq.ops import linear_layers
from test_ops import values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMAT = ("group", "hadamard128")
N, K = 20, 300


@pytest.fixture(scope="module")
def packed():
    planes, scales = flexq.quantize_weight(values(N, K, seed=1), *FORMAT)
    return flexq.prepack(planes, scales, K, *FORMAT)


def views(dtype):
    """Tensors [..., K] as callers have them: whole, slices, transposed, expanded, of one token, of none."""
    x = values(6, 4, K + 5).to(dtype)
    whole = x[..., :K].contiguous()
    yield from (whole, whole[0], whole[0, 0], whole[:0], whole[:, :0])
    yield from (x[..., :K], x[0, :, :K], x[:, 0, :K], x[::2, :, :K], x[..., 5:])
    yield from (whole.transpose(0, 1), whole[:, :1].transpose(0, 1), whole[0].expand(3, 4, K), whole[:1, :1])
    yield x.permute(2, 0, 1)[:K].permute(1, 2, 0)
    yield values(K, 7).to(dtype).T
    yield x[0, :1, :K].as_strided((2, K), (1, 1))  # rows that overlap


def same(results, expected) -> None:
    results, expected = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (results, expected))
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype and result.shape == wanted.shape and result.is_contiguous()
        assert torch.equal(result, wanted)


def test_there_is_a_kernel_in_cpp():
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        pytest.skip("PyTorch's C shim is too old")
    for name in (
        "linear", "gemm", "quantize_activation", "rms_norm_quantize", "silu_mul_quantize", "rms_norm_linear",
        "silu_mul_linear", "experts_forward",
    ):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flexq::{name}", "CPU")
        assert "torch_ops.cpp" in torch._C._dispatch_dump(f"flexq::{name}")
    assert not _core.implement_operator("prepack", "CPU")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view(packed, dtype):
    weight = (1 + values(K, seed=2) * 0.1).to(dtype)
    bias = values(N, seed=3)
    for x in views(dtype):
        for b in (None, bias, bias.to(dtype)):
            same(
                torch.ops.flexq.linear(x, packed, b, N, 8, *FORMAT), linear_layers._linear(x, packed, b, N, 8, *FORMAT)
            )
        m = x.numel() // K

        def codes(quantized, format, bits, m=m):
            return flexq.activation_codes(quantized, m, K, bits, *format)

        quantized = torch.ops.flexq.quantize_activation(x, 6, *FORMAT)
        same(codes(quantized, FORMAT, 6), codes(linear_layers._quantize_activation(x, 6, *FORMAT), FORMAT, 6))
        arguments = (quantized, packed, bias, m, N, K, 6, *FORMAT, dtype)
        same(torch.ops.flexq.gemm(*arguments), linear_layers._gemm(*arguments))
        for residual in (None, x.flip(0), x):
            arguments = (x, residual, weight, 1e-5, 8, *FORMAT)
            results = torch.ops.flexq.rms_norm_quantize(*arguments), linear_layers._rms_norm_quantize(*arguments)
            same(*(codes(quantized, FORMAT, 8) for quantized, _ in results))
            same(*(total for _, total in results))
            arguments = (x, residual, weight, 1e-5, packed, bias, N, 8, *FORMAT)
            same(torch.ops.flexq.rms_norm_linear(*arguments), linear_layers._rms_norm_linear(*arguments))
        channel = ("channel", "none")
        arguments = (x, x.flip(-1), 8, *channel)
        results = torch.ops.flexq.silu_mul_quantize(*arguments), linear_layers._silu_mul_quantize(*arguments)
        same(*(codes(quantized, channel, 8) for quantized in results))
        arguments = (torch.cat([x, x.flip(-1)], -1), packed, bias, N, 6, *FORMAT)
        same(torch.ops.flexq.silu_mul_linear(*arguments), linear_layers._silu_mul_linear(*arguments))


def test_fused_linears_are_the_quantizer_and_the_gemm(packed):
    """Of rows that lie apart, and of every width of weights."""
    x, weight = values(5, 2 * K + 3).bfloat16()[:, : 2 * K], torch.ones(K).bfloat16()
    for bits in ops.WEIGHT_BITS:
        wide = flexq.prepack(*flexq.quantize_weight(values(N, K, seed=1), *FORMAT, bits), K, *FORMAT)
        rest = (N, 8, *FORMAT)
        gate, up = x[:, :K], x[:, K:]
        quantized, total = flexq.rms_norm_quantize(gate, up, weight, 1e-5)
        expected = flexq.gemm(quantized, wide, None, 5, N, K, *rest[1:], torch.bfloat16, bits)
        same(ops.rms_norm_linear(gate, up, weight, 1e-5, wide, None, *rest, bits), (expected, total))
        expected = flexq.gemm(flexq.silu_mul_quantize(gate, up), wide, None, 5, N, K, *rest[1:], torch.bfloat16, bits)
        same(ops.silu_mul_linear(x, wide, None, *rest, bits), expected)


def test_fused_linears_are_traced_for_any_number_of_tokens(packed):
    def block(x, residual, weight):
        y, total = ops.rms_norm_linear(x, residual, weight, 1e-5, packed, None, N)
        return ops.silu_mul_linear(torch.cat([total, total], -1), packed, None, N) + y

    compiled = torch.compile(block, dynamic=True, fullgraph=True)
    weight = torch.ones(K)
    for m, stance in ((2, "default"), (7, "fail_on_recompile"), (64, "fail_on_recompile")):
        x, residual = values(m, K, seed=m), values(m, K, seed=m + 1)
        with torch.compiler.set_stance(stance):
            assert torch.allclose(compiled(x, residual, weight), block(x, residual, weight), atol=1e-5)


def both_refuse(name, *arguments) -> None:
    with pytest.raises(ValueError) as native:
        getattr(torch.ops.flexq, name)(*arguments)
    with pytest.raises(ValueError) as python:
        getattr(experts_ops if name.startswith("experts") else linear_layers, f"_{name}")(*arguments)
    assert str(native.value) == str(python.value)


def test_refuses_alike(packed):
    x, wide = torch.zeros(2, K), torch.zeros(2, K, dtype=torch.float64)
    strided = torch.zeros(2 * packed.numel(), dtype=torch.uint8)[::2]
    for given in (
        (wide, packed, None, N, 8, *FORMAT),
        (torch.zeros(2, 0), packed, None, N, 8, *FORMAT),
        (torch.tensor(1.0), packed, None, N, 8, *FORMAT),
        (x, packed.float(), None, N, 8, *FORMAT),
        (x, strided, None, N, 8, *FORMAT),
        (x, packed[:100], None, N, 8, *FORMAT),
        (x, packed, torch.zeros(N + 1), N, 8, *FORMAT),
        (x, packed, torch.zeros(N, 2)[:, 0], N, 8, *FORMAT),
        (x, packed, torch.zeros(N, dtype=torch.int64), N, 8, *FORMAT),
        (x, packed, None, -1, 8, *FORMAT),
        (x, packed, None, N, 7, *FORMAT),
        (x, packed, None, N, 8, "row", "none"),
        (x, packed, None, N, 8, "group", "all"),
    ):
        both_refuse("linear", *given)
    both_refuse("quantize_activation", wide, 8, *FORMAT)
    with pytest.raises((ValueError, TypeError)):
        torch.ops.flexq.quantize_activation(x, 1 << 40, *FORMAT)
    both_refuse("silu_mul_quantize", x, x[:1], 8, *FORMAT)
    both_refuse("silu_mul_quantize", wide, wide, 8, *FORMAT)
    both_refuse("rms_norm_quantize", x, x[:1], x[0], 1e-5, 8, *FORMAT)
    both_refuse("rms_norm_quantize", x, None, x[0, 1:], 1e-5, 8, *FORMAT)
    both_refuse("rms_norm_quantize", x, None, x[0], -1.0, 8, *FORMAT)
    both_refuse("rms_norm_linear", x, x[:1], x[0], 1e-5, packed, None, N, 8, *FORMAT)
    both_refuse("rms_norm_linear", x, None, x[0], 1e-5, packed[:100], None, N, 8, *FORMAT)
    both_refuse("rms_norm_linear", x, None, x[0], 1e-5, packed, None, -1, 8, *FORMAT)
    for gate_up in (wide, x[:, 1:], x[:, :0], torch.tensor(1.0)):
        both_refuse("silu_mul_linear", gate_up, packed, None, N, 8, *FORMAT)
    both_refuse("silu_mul_linear", x, packed[:100], None, N, 8, *FORMAT)
    quantized = flexq.quantize_activation(x)
    both_refuse("gemm", quantized, packed, None, 2, N, K, 8, *FORMAT, torch.float64)
    both_refuse("gemm", quantized, packed, None, 2, N, K + 128, 8, *FORMAT, torch.float32)
    both_refuse("gemm", quantized[:10], packed, None, 2, N, K, 8, *FORMAT, torch.float32)
    both_refuse("gemm", quantized, packed, None, 2, -N, K, 8, *FORMAT, torch.float32)


@pytest.fixture(scope="module")
def experts():
    desc = ops.ExpertsDesc(3, K, 40, down_scheme="channel", limit=7.0, up_offset=1.0, alpha=1.702, interleaved=True)
    packed = []
    for projection in ("gate_up", "down"):
        n, k = desc.shape(projection)
        planes, scales = flexq.quantize_weight(values(3 * n, k, seed=n) * 0.1, desc.scheme(projection))
        packed.append(ops.experts_prepack(planes.unflatten(0, (3, n)), scales.unflatten(0, (3, n)), projection, desc))
    return desc, packed


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_every_view(experts, dtype):
    desc, packed = experts
    up_bias, down_bias = values(3, 80, seed=4), values(3, K, seed=5)
    expert_map = torch.tensor([2, -1, 0], dtype=torch.int32)
    for x in views(dtype):
        ids = torch.arange(x.numel() // K * 6).remainder(3).view(*x.shape[:-1], 6)[..., ::3]
        weights = (ids - 0.5).to(dtype)
        for rest in (
            (None, None, None, False),
            (up_bias, None, expert_map, True),
            (None, down_bias.to(dtype), None, True),
            (up_bias, down_bias, expert_map, False),
        ):
            arguments = (x, ids, weights, *packed, *rest, *desc)
            same(torch.ops.flexq.experts_forward(*arguments), experts_ops._experts_forward(*arguments))


def test_experts_refuse_alike(experts):
    desc, (gate_up, down) = experts
    x, ids, weights = torch.zeros(2, K), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    biases, wide = (None, torch.zeros(3, K), None, False), torch.zeros(2, K, dtype=torch.float64)
    for given in (
        (wide, ids, weights, gate_up, down, *biases, *desc),
        (x[:, 1:], ids, weights, gate_up, down, *biases, *desc),
        (x, ids.short(), weights, gate_up, down, *biases, *desc),
        (x, ids[:1], weights, gate_up, down, *biases, *desc),
        (x[0], ids, weights, gate_up, down, *biases, *desc),
        (x, ids[:, :0], weights[:, :0], gate_up, down, *biases, *desc),
        (x, ids + 3, weights, gate_up, down, *biases, *desc),
        (x, ids, weights[:1], gate_up, down, *biases, *desc),
        (x, ids, weights.double(), gate_up, down, *biases, *desc),
        (x, ids, weights, gate_up[1:], down, *biases, *desc),
        (x, ids, weights, gate_up, down.float(), *biases, *desc),
        (x, ids, weights, gate_up, down, torch.zeros(3, 79), None, None, False, *desc),
        (x, ids, weights, gate_up, down, None, torch.zeros(K), None, False, *desc),
        (x, ids, weights, gate_up, down, torch.zeros(3, 80).half(), torch.zeros(3, K), None, False, *desc),
        (x, ids, weights, gate_up, down, None, None, torch.zeros(3), False, *desc),
        (x, ids, weights, gate_up, down, None, None, torch.full((3,), 3, dtype=torch.int32), False, *desc),
        (x, ids, weights, gate_up, down, *biases, *desc._replace(function="relu")),
        (x, ids, weights, gate_up, down, *biases, *desc._replace(down_act_bits=7)),
        (x, ids, weights, gate_up, down, *biases, *desc._replace(limit=-1.0)),
        (x, ids, weights, gate_up, down, *biases, *desc._replace(gate_up_scheme="row")),
    ):
        both_refuse("experts_forward", *given)


def resident_kilobytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4


def test_nothing_leaks(packed, experts):
    desc, expert_weights = experts
    ids = torch.arange(12).remainder(3).view(3, 4)[:, ::2]
    x, residual, weight = values(3, K), values(3, K), torch.ones(K)

    def calls():
        for _ in range(2000):
            torch.ops.flexq.linear(x.T.contiguous().T, packed, torch.zeros(N), N, 8, *FORMAT)
            torch.ops.flexq.rms_norm_quantize(x, residual, weight, 1e-5, 8, *FORMAT)
            torch.ops.flexq.rms_norm_linear(x, residual, weight, 1e-5, packed, torch.zeros(N), N, 8, *FORMAT)
            torch.ops.flexq.silu_mul_linear(torch.cat([x, x], -1), packed, None, N, 8, *FORMAT)
            torch.ops.flexq.experts_forward(
                x, ids, ids.float(), *expert_weights, None, torch.zeros(3, K), None, False, *desc
            )
            with pytest.raises(ValueError):
                torch.ops.flexq.linear(x, packed, torch.zeros(N + 1), N, 8, *FORMAT)

    calls()
    before = resident_kilobytes()
    calls()
    assert resident_kilobytes() - before < 2000  # a leaked tensor of each call would be 20 MB


def test_tensors_that_are_not_in_memory_are_refused():
    """PyTorch calls what stands for an operator in tracing where some tensors are on the meta device."""
    layer = flexq.Linear.from_float(torch.nn.Linear(96, 40))
    layer.bias = torch.nn.Parameter(torch.empty(40, device="meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"flexq::linear needs all of its tensors on one device, got cpu, cpu, meta"):
        layer(torch.randn(3, 96))
    experts = Experts.from_float(*(torch.randn(shape) for shape in ((4, 64, 32), (4, 32, 32), (4, 64), (4, 32))))
    experts.down_proj.bias = torch.nn.Parameter(torch.empty(4, 32, device="meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="flexq::experts_forward needs all of its tensors on one device"):
        experts(torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2))
    with pytest.raises(RuntimeError, match="the weight is not in memory, but on the meta device"):
        flexq.Linear(96, 40, device="meta")(torch.empty(3, 96, device="meta"))
