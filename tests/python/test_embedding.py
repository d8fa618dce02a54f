"""flexq.Embedding as a module."""

import copy
import io
import pickle

import flexq
import pytest
import reference
import torch
from torch import nn

SHAPES = [(1, 64), (17, 100), (17, 576), (40, 128)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def embedding(n=17, k=100, dtype=torch.float32, **settings) -> tuple[nn.Embedding, flexq.Embedding]:
    torch.manual_seed(0)
    given = nn.Embedding(n, k, dtype=dtype)
    canonical = flexq.quantize_weight(given.weight.detach(), "channel", "none", 8)
    return given, flexq.Embedding(n, k, dtype=dtype, **settings).set_canonical(*canonical).prepack()


def expected(given: nn.Embedding, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: codes times scales in float64, rounded to the dtype."""
    codes, scales = reference.quantize_weight(given.weight.detach(), "channel", "none", 8)
    return (codes[:, : given.embedding_dim].double() * scales.double()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_looks_up_codes_times_scales(n, k, dtype):
    given, quantized = embedding(n, k, dtype)
    ids = torch.randint(0, n, (2, 5))
    y = quantized(ids)
    assert y.dtype == dtype and torch.equal(y, expected(given, dtype)[ids])
    assert (y - given(ids)).norm() < 0.01 * given(ids).norm()
    assert torch.equal(quantized.dequantize(dtype), expected(given, dtype))


def test_is_what_the_library_dequantizes():
    _, quantized = embedding(33, 200)
    planes, scales = quantized.canonical()
    assert torch.equal(quantized.dequantize(), flexq.dequantize_weight(planes, scales, 200, "channel", "none"))


def test_ids_of_any_shape_and_stride():
    given, quantized = embedding()
    rows = expected(given, torch.float32)
    ids = torch.randint(0, 17, (6, 8))
    for some in (ids, ids.t(), ids[::2, 1::3], ids[0, 0], ids.int(), ids[:, :0], ids.reshape(2, 3, 8)):
        assert torch.equal(quantized(some), rows[some.long()]), some.shape


def test_refuses_what_pytorch_refuses():
    given, quantized = embedding()
    for ids in (torch.tensor([17]), torch.tensor([0, -1])):
        for module in (given, quantized):
            with pytest.raises(IndexError, match="out of range"):
                module(ids)
    for module in (given, quantized):
        with pytest.raises(RuntimeError, match="indices"):
            module(torch.tensor([0.5]))


def test_one_copy_is_resident():
    _, quantized = embedding(17, 100)
    assert quantized.qweight.numel() == quantized.scales.numel() == 0
    assert quantized.weight_bytes == 17 * (100 + 2) and quantized.stored_bytes == 17 * (128 + 2)


def test_state_dict_is_canonical_and_loads():
    _, quantized = embedding()
    state = quantized.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "qweight": (torch.uint8, (17, 1, 8, 16)),
        "scales": (torch.float16, (17, 1)),
    }
    fresh, ids = flexq.Embedding(17, 100), torch.arange(17)
    fresh.load_state_dict(state)
    assert fresh.is_prepacked and torch.equal(fresh(ids), quantized(ids))
    again = fresh.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_copies_and_pickles():
    _, quantized = embedding(embed_scale=3.0, padding_idx=2)
    ids, buffer = torch.arange(17), io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(ids), quantized(ids)) and other.padding_idx == 2


def test_moves_change_the_dtype_of_what_comes_out():
    given, quantized = embedding(embed_scale=0.3, rounds_scale=True)
    ids = torch.arange(17)
    quantized.to(torch.bfloat16)
    rounded = torch.tensor(0.3, dtype=torch.bfloat16)
    assert torch.equal(quantized(ids), expected(given, torch.bfloat16) * rounded)
    quantized.to(torch.float32)
    assert torch.equal(quantized(ids), expected(given, torch.float32) * 0.3)
    quantized.to("meta")
    assert quantized.qweight.is_meta and quantized.weight.device.type == "meta"


def test_the_weight_stands_for_itself():
    given, quantized = embedding(dtype=torch.bfloat16)
    weight = quantized.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((17, 100), torch.bfloat16, "cpu")
    assert torch.equal(weight + 0, expected(given, torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"flexq\.Embedding cannot be written to"):
        weight.zero_()


def test_scales_that_are_none():
    _, quantized = embedding()
    planes, scales = quantized.canonical()
    scales[3] = torch.nan
    with pytest.raises(ValueError, match="scales must be finite and not negative, got nan at row 3"):
        flexq.Embedding(17, 100).set_canonical(planes, scales).prepack()


@pytest.mark.parametrize(("scheme", "bits", "k"), [("channel", 6, 100), ("group", 8, 200), ("channel", 8, 200)])
def test_refuses_other_weights(scheme, bits, k):
    canonical = flexq.quantize_weight(torch.randn(17, k), scheme, "none", bits)
    with pytest.raises(ValueError, match=r"planes must be uint8 \[17, 1, 8, 16\] and scales float16 \[17, 1\]"):
        flexq.Embedding(17, 100).set_canonical(*canonical).prepack()


def test_rows_of_zeros():
    zeros = torch.zeros(3, 64)
    zeros[1, 5] = 2.0
    quantized = flexq.Embedding(3, 64).set_canonical(*flexq.quantize_weight(zeros, "channel", "none", 8))
    assert torch.equal(quantized(torch.tensor([0, 2])), torch.zeros(2, 64))


def test_compiles():
    _, quantized = embedding()
    ids = torch.randint(0, 17, (2, 5))
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), quantized(ids))


def test_repr_shows_shape_and_bits():
    assert "Embedding(17, 100, W8, embed_scale=2)" in repr(embedding(embed_scale=2.0)[1])
