"""Quantizers fused with the operation before them, against the same operations one by one."""

import flexq
import pytest
import torch
from flexq import _core
from flexq.execution import stream_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm(x, residual, weight, eps):
    h = x if residual is None else x + residual
    norm = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    return norm.to(x.dtype) * weight, h


def assert_quantized_alike(quantized, plain, m, k, bits, scheme, rotation):
    """The same but for a code or two where a float operation rounded the other way."""
    codes, scales = flexq.activation_codes(quantized, m, k, bits, scheme, rotation)
    want, want_scales = flexq.activation_codes(plain, m, k, bits, scheme, rotation)
    torch.testing.assert_close(scales, want_scales, rtol=2e-2, atol=1e-7)
    different = (codes - want).abs()
    assert different.max() <= 3 and (different > 0).float().mean() < 0.08


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("m, k", ((1, 576), (9, 100), (33, 4097)))
@pytest.mark.parametrize("with_residual", (False, True))
def test_rms_norm_quantize(with_residual, m, k, scheme, dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*s).to(dtype) for s in ((m, k), (m, k), (k,)))
    given = residual if with_residual else None
    quantized, h = flexq.rms_norm_quantize(x, given, weight, 1e-5, 8, scheme)
    normed, want = rms_norm(x, given, weight, 1e-5)
    assert torch.equal(h, want)
    plain = flexq.quantize_activation(normed, 8, scheme)
    assert_quantized_alike(quantized, plain, m, k, 8, scheme, "hadamard128")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("m, k", ((1, 576), (9, 100), (33, 4097)))
def test_silu_mul_quantize(m, k, scheme, dtype):
    torch.manual_seed(0)
    both = torch.randn(m, 2 * k).to(dtype)
    gate, up = both[:, :k], both[:, k:]  # rows that are not contiguous
    quantized = flexq.silu_mul_quantize(gate, up, 6, scheme)
    plain = flexq.quantize_activation(torch.nn.functional.silu(gate) * up, 6, scheme)
    assert_quantized_alike(quantized, plain, m, k, 6, scheme, "hadamard128")


def test_not_finite_poisons_its_token_only():
    x, weight = torch.randn(4, 256), torch.ones(256)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    for scheme in ("group", "channel"):
        quantized, _ = flexq.rms_norm_quantize(x, None, weight, 1e-5, 8, scheme)
        scales = flexq.activation_codes(quantized, 4, 256, 8, scheme, "hadamard128")[1]
        assert scales.isnan().any(-1).tolist() == [False, True, True, False]


def test_no_tokens():
    quantized, h = flexq.rms_norm_quantize(torch.empty(0, 128), None, torch.ones(128))
    assert h.shape == (0, 128) and quantized.numel() == 0
    assert flexq.silu_mul_quantize(torch.empty(0, 128), torch.empty(0, 128)).numel() == 0


def test_bad_arguments():
    x, weight = torch.randn(2, 64), torch.ones(64)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        flexq.rms_norm_quantize(x, None, weight[:32])
    with pytest.raises(ValueError, match="residual must be like x"):
        flexq.rms_norm_quantize(x, x[:1], weight)
    with pytest.raises(ValueError, match="eps must be 0 or more and finite, got -1"):
        flexq.rms_norm_quantize(x, None, weight, -1.0)
    with pytest.raises(ValueError, match="up must be like gate"):
        flexq.silu_mul_quantize(x, x.half())


def test_kernels_of_a_gemm_have_names():
    desc = _core.WeightDesc(64, 256, "group", "none")
    stream = stream_for(torch.device("cpu"))
    ((name, _),) = _core.gemm_kernels(stream, desc, 8, 4)
    assert name == _core.device_isa("cpu")
    assert _core.gemm_workspace_size(stream.with_kernel(name), desc, 8, 4) == 0
    with pytest.raises(ValueError, match=r"stream\.kernel must be null or"):
        _core.gemm_workspace_size(stream.with_kernel("another"), desc, 8, 4)
