"""Tensor-level operators against the float64 reference."""

import flexq
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCHEMES = ("group", "channel")
ROTATIONS = ("none", "hadamard128")
WIDTHS = (4, 5, 6, 8)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.where(torch.rand(*shape, generator=generator) < 0.01, 20.0, 1.0)


def packed_weight(n: int, k: int, scheme: str, rotation: str, weight_bits: int = 6, seed: int = 1):
    planes, scales = flexq.quantize_weight(values(n, k, seed=seed) * 0.02, scheme, rotation, weight_bits)
    return planes, scales, flexq.prepack(planes, scales, k, scheme, rotation)


def assert_rounded(y: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """y is the float64 value rounded to its type, give or take fp32's sums (1e-5) and one unit in the last place."""
    ulp = torch.finfo(y.dtype).eps * expected.abs() if y.dtype != torch.float32 else 0.0
    tiny = torch.finfo(y.dtype).smallest_normal
    assert ((y.double() - expected).abs() <= 1e-5 * magnitude + ulp + tiny).all()


@settings(max_examples=150, deadline=None)
@given(
    m=st.sampled_from([0, 1, 3, 7, 8, 9, 65, 129]),
    n=st.sampled_from([1, 5, 16, 17, 40]),
    k=st.sampled_from([1, 64, 100, 128, 129, 576, 4097]),
    bits=st.sampled_from([6, 8]),
    weight_bits=st.sampled_from(WIDTHS),
    scheme=st.sampled_from(SCHEMES),
    rotation=st.sampled_from(ROTATIONS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_linear(m, n, k, bits, weight_bits, scheme, rotation, dtype, bias, strided):
    planes, scales, packed = packed_weight(n, k, scheme, rotation, weight_bits)
    x = values(m, k + 5, seed=m + k).to(dtype)[:, :k] if strided else values(m, k, seed=m + k).to(dtype)
    b = values(n, seed=3).to(dtype) if bias else None
    y = flexq.linear(x, packed, b, n, bits, scheme, rotation, weight_bits)
    assert y.shape == (m, n) and y.dtype == dtype

    quantized = flexq.quantize_activation(x, bits, scheme, rotation)
    codes, a_scales = flexq.activation_codes(quantized, m, k, bits, scheme, rotation)
    expected, magnitude = reference.product(codes, a_scales, flexq.unpack_codes(planes), scales)
    if bias:
        expected, magnitude = expected + b.double(), magnitude + b.double().abs()
    assert_rounded(y, expected, magnitude)
    assert torch.equal(y, flexq.gemm(quantized, packed, b, m, n, k, bits, scheme, rotation, dtype, weight_bits))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight_bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_weight_matches_reference(dtype, weight_bits, scheme, rotation):
    weight = values(33, 300).to(dtype)
    planes, scales = flexq.quantize_weight(weight, scheme, rotation, weight_bits)
    assert planes.shape == (33, 3, weight_bits, 16)
    codes, expected_scales = reference.quantize_weight(weight, scheme, rotation, weight_bits)
    # The library rotates in fp32: a value next to a rounding boundary may fall on its other side.
    near = (scales.double() / expected_scales.double() - 1).abs() < 2e-3  # else another share, as good
    assert near.all() if weight_bits >= 6 else near.float().mean() > 0.98
    assert (scales == expected_scales).float().mean() > 0.97
    same_scale = (scales == expected_scales).expand(33, -1).repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    difference = (flexq.unpack_codes(planes).int() - codes.int()).abs()[same_scale]
    assert difference.max() <= 1 and (difference > 0).float().mean() < (1e-3 if weight_bits < 8 else 5e-3)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_that_vanish_are_zero(scheme, rotation):
    weight = values(5, 300)
    weight[1], weight[3, 128:256] = 1e-9, 1e-9
    planes, scales = flexq.quantize_weight(weight, scheme, rotation)
    codes, expected_scales = reference.quantize_weight(weight, scheme, rotation)
    assert torch.equal(scales == 0, expected_scales == 0) and (scales[1] == 0).all()
    assert (codes[1] == 0).all() and (flexq.unpack_codes(planes)[1] == 0).all()
    back = flexq.dequantize_weight(planes, scales, 300, scheme, rotation)
    assert (back[1] == 0).all() and back[3, 128:256].abs().max() < 1e-6


@pytest.mark.parametrize("bits", (6, 8))
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_activation_matches_reference(bits, scheme, rotation):
    x = values(9, 300)
    quantized = flexq.quantize_activation(x, bits, scheme, rotation)
    codes, scales = flexq.activation_codes(quantized, 9, 300, bits, scheme, rotation)
    expected_codes, expected_scales = reference.quantize_activation(x, bits, scheme, rotation)
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-6, atol=0)
    difference = (codes.double() - expected_codes.view(9, -1)).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_every_dtype_are_read_alike(dtype):
    x = values(4, 256).to(dtype)
    arguments = (4, 256, 8, "group", "hadamard128")
    codes, scales = flexq.activation_codes(flexq.quantize_activation(x), *arguments)
    codes32, scales32 = flexq.activation_codes(flexq.quantize_activation(x.float()), *arguments)
    assert torch.equal(codes, codes32) and torch.equal(scales, scales32)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_dequantize_undoes_the_rotation(rotation):
    weight = values(7, 200)
    planes, scales = flexq.quantize_weight(weight, "group", rotation)
    back = flexq.dequantize_weight(planes, scales, 200, "group", rotation)
    assert ((back - weight).norm() / weight.norm()) < (0.1 if rotation == "none" else 0.04)
    again = flexq.dequantize_weight(planes, scales, 200, "group", rotation, torch.bfloat16)
    assert torch.equal(again, back.bfloat16())


@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_prepack_round_trip(weight_bits):
    planes, scales, packed = packed_weight(37, 300, "group", "hadamard128", weight_bits)
    back = flexq.unprepack(packed, 37, 300, "group", "hadamard128", weight_bits)
    assert torch.equal(back[0], planes) and torch.equal(back[1], scales)
    assert packed.numel() == 48 * 3 * (16 * weight_bits + 2) + (-48 * 3 * 2) % 64  # rows padded to 16, scales to 64


@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_codes_round_trip(weight_bits):
    end = 2 ** (weight_bits - 1)
    codes = torch.randint(-end, end, (5, 256)).to(torch.int8)
    assert torch.equal(flexq.unpack_codes(flexq.pack_codes(codes, weight_bits)), codes)
    if weight_bits < 8:
        codes[2, 130] = end
        with pytest.raises(ValueError, match=rf"codes\[2\]\[130\] is {end}; {weight_bits}-bit codes are -{end} to"):
            flexq.pack_codes(codes, weight_bits)


def test_planes_slice_along_both_sides():
    """Rows and groups of a canonical weight are plain slices, which tensor parallelism and fused layers rely on."""
    n, k = 24, 512
    planes, scales, packed = packed_weight(n, k, "group", "hadamard128")
    x = values(3, k)
    whole = flexq.linear(x, packed, None, n)
    top = flexq.prepack(planes[:10], scales[:10], k, "group", "hadamard128")
    assert torch.equal(flexq.linear(x, top, None, 10), whole[:, :10])
    halves = [
        flexq.linear(x[:, part], flexq.prepack(planes[:, g], scales[:, g], 256, "group", "hadamard128"), None, n)
        for part, g in ((slice(0, 256), slice(0, 2)), (slice(256, 512), slice(2, 4)))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_poisons_its_token_only(value, dtype):
    _, _, packed = packed_weight(20, 300, "group", "hadamard128")
    x = values(4, 300).to(dtype)
    x[2, 299] = value
    y = flexq.linear(x, packed, None, 20)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_huge_and_tiny_activations():
    _, _, packed = packed_weight(20, 256, "group", "hadamard128")
    for magnitude in (1e-30, 1e30):
        x = values(2, 256)
        y = flexq.linear(x * magnitude, packed, None, 20)
        torch.testing.assert_close(y / magnitude, flexq.linear(x, packed, None, 20), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_bits": 7}, "act_bits must be 6 or 8, got 7"),
        ({"weight_bits": 7}, "weight_bits must be 4, 5, 6 or 8, got 7"),
        ({"weight_bits": 8}, "prepacked must have at least"),
        ({"scheme": "row"}, "scheme must be 'group' or 'channel', got 'row'"),
        ({"rotation": "full"}, "rotation must be 'none' or 'hadamard128', got 'full'"),
        ({"n": 40}, "prepacked must have at least"),
        ({"x": torch.zeros(2, 300, dtype=torch.float64)}, "x must be float32, float16 or bfloat16, got torch.float64"),
        ({"x": torch.zeros(2, 0)}, "K at least 1"),
        ({"bias": torch.zeros(21)}, r"bias must be contiguous \[20\]"),
        ({"packed": torch.zeros(5000)}, "packed must be contiguous uint8"),
    ],
)
def test_linear_refuses(change, message):
    arguments = {
        "x": torch.zeros(2, 300),
        "packed": packed_weight(20, 300, "group", "hadamard128")[2],
        "bias": None,
        "n": 20,
        "act_bits": 8,
        "scheme": "group",
        "rotation": "hadamard128",
    }
    with pytest.raises(ValueError, match=message):
        flexq.linear(**(arguments | change))


def test_quantize_weight_refuses():
    weight = torch.ones(3, 128)
    weight[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[1\]\[5\] is -?nan; weights must be finite"):
        flexq.quantize_weight(weight)
    with pytest.raises(ValueError, match="which leaves fp16's range; accepted is up to"):
        flexq.quantize_weight(torch.full((1, 128), 1e8))
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        flexq.quantize_weight(torch.ones(128))
    with pytest.raises(ValueError, match="weight_bits must be 4, 5, 6 or 8, got 3"):
        flexq.quantize_weight(torch.ones(1, 128), weight_bits=3)


def test_prepack_refuses_other_shapes():
    planes, scales, _ = packed_weight(4, 256, "group", "none")
    with pytest.raises(ValueError, match=r"planes must be uint8 \[N, 3, b, 16\] for K = 300, b being 4, 5, 6 or 8"):
        flexq.prepack(planes, scales, 300, "group", "none")
    with pytest.raises(ValueError, match=r"scales must be float16 \[4, 1\] for scheme channel"):
        flexq.prepack(planes, scales, 256, "channel", "none")


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (-0.5, "-0.5")])
def test_prepack_refuses_scales_that_are_none(value, text):
    planes, scales, _ = packed_weight(4, 256, "group", "none")
    scales[2, 1] = value
    with pytest.raises(ValueError, match=f"the scale of row 2, group 1 is {text}; scales must be finite and 0 or more"):
        flexq.prepack(planes, scales, 256, "group", "none")


def test_operators_trace():
    """Fake kernels agree with the real ones, as `torch.library.opcheck` sees it."""
    planes, scales, packed = packed_weight(20, 300, "group", "hadamard128")
    x = values(3, 300)
    ops = torch.ops.flexq
    quantized = flexq.quantize_activation(x)
    tests = ("test_schema", "test_faketensor")
    calls = (
        (ops.quantize_weight, (values(5, 300), "channel", "none")),
        (ops.dequantize_weight, (planes, scales, 300, "group", "hadamard128", torch.bfloat16)),
        (ops.prepack, (planes, scales, 300, "group", "hadamard128")),
        (ops.unprepack, (packed, 20, 300, "group", "hadamard128")),
        (ops.quantize_activation, (x, 8, "group", "hadamard128")),
        (ops.activation_codes, (quantized, 3, 300, 8, "group", "hadamard128")),
        (ops.gemm, (quantized, packed, None, 3, 20, 300, 8, "group", "hadamard128", torch.float16)),
        (ops.linear, (x, packed, values(20), 20, 8, "group", "hadamard128")),
        (ops.quantize_weight, (values(5, 300), "channel", "none", 4)),
        (ops.unprepack, (packed_weight(20, 300, "group", "none", 5)[2], 20, 300, "group", "none", 5)),
        (ops.linear, (x, packed_weight(20, 300, "group", "none", 8)[2], None, 20, 6, "group", "none", 8)),
    )
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_threads_do_not_change_the_bits():
    _, _, packed = packed_weight(200, 640, "group", "hadamard128")
    x = values(70, 640)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(flexq.linear(x, packed, None, 200))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
