"""flexq.Linear as a module."""

import copy
import io
import pickle

import flexq
import pytest
import torch
from torch import nn


def layer(config=None, bias=True, n=24, k=200) -> tuple[nn.Linear, flexq.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias)
    return linear, flexq.Linear.from_float(linear, config)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("bits", (6, 8))
@pytest.mark.parametrize(("weight_bits", "most"), [(4, 0.16), (5, 0.08), (6, 0.04), (8, 0.012)])
def test_close_to_float(weight_bits, most, bits, scheme, bias):
    linear, quantized = layer(flexq.LayerConfig(act_bits=bits, scheme=scheme, weight_bits=weight_bits), bias)
    x = torch.randn(2, 5, 200)
    y = quantized(x)
    assert y.shape == (2, 5, 24) and y.dtype == x.dtype
    error = (y - linear(x)).norm() / linear(x).norm()
    assert error < (most + 0.04 if bits == 6 else most)


def test_one_copy_is_resident():
    _, quantized = layer()
    assert quantized.is_prepacked and quantized.qweight.numel() == quantized.scales.numel() == 0
    assert quantized.weight_bytes <= 32 * 2 * 98 + 64  # rows padded to 16, two groups of 96 + 2 bytes


@pytest.mark.parametrize("weight_bits", (4, 5, 6, 8))
def test_every_width_round_trips(weight_bits):
    _, quantized = layer(flexq.LayerConfig(weight_bits=weight_bits))
    assert quantized.stored_bytes == 24 * 2 * (16 * weight_bits + 2)
    fresh = flexq.Linear(200, 24, config=quantized.config)
    fresh.load_state_dict(quantized.state_dict())
    x = torch.randn(3, 200)
    assert torch.equal(fresh(x), quantized(x)) and torch.equal(copy.deepcopy(quantized)(x), quantized(x))
    torch.testing.assert_close(quantized.dequantize(), quantized._outputs_of_unit_vectors().T)
    other = flexq.Linear(200, 24, config=flexq.LayerConfig(weight_bits=5 if weight_bits == 8 else 8))
    with pytest.raises(
        RuntimeError, match=f"has weight_bits {other.config.weight_bits}, the state_dict's has {weight_bits}"
    ):
        other.load_state_dict(quantized.state_dict())


@pytest.mark.parametrize("settings", [{"rotation": "none"}, {"scheme": "channel"}])
def test_codes_that_mean_something_else_are_refused(settings, tmp_path):
    """One group of inputs: the shapes are the same. Codes may be read for activations of other bits."""
    quantized = flexq.Linear.from_float(nn.Linear(128, 24))
    torch.save(nn.Sequential(quantized).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    other = nn.Sequential(flexq.Linear(128, 24, config=flexq.LayerConfig(**settings)))
    before = other[0].canonical()[0].clone()
    (name, value), own = *settings.items(), flexq.LayerConfig()
    with pytest.raises(RuntimeError, match=f"the layer has {name} "):
        other[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True) and quantized.state_dict())
    with pytest.raises(RuntimeError, match=f"0 has {name} '{value}', the state_dict's has '{getattr(own, name)}'"):
        other.load_state_dict(state)
    assert torch.equal(other[0].canonical()[0], before)
    nn.Sequential(flexq.Linear(128, 24, config=flexq.LayerConfig(act_bits=6))).load_state_dict(state)


def test_repr_shows_shapes_and_bits():
    assert "in_features=200, out_features=24, bias=True, W6A8, scheme=group" in repr(layer()[1])


def test_state_dict_is_canonical_and_loads():
    _, quantized = layer()
    state = quantized.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "bias": (torch.float32, (24,)),
        "qweight": (torch.uint8, (24, 2, 6, 16)),
        "scales": (torch.float16, (24, 2)),
    }
    x = torch.randn(3, 200)
    for fresh in (flexq.Linear(200, 24), layer()[1]):
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), quantized(x))


def test_load_state_dict_refuses():
    _, quantized = layer()
    state = quantized.state_dict()
    with pytest.raises(RuntimeError, match=r"scales must be torch.float16, got torch.float32"):
        flexq.Linear(200, 24).load_state_dict(state | {"scales": state["scales"].float()})
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        flexq.Linear(100, 24).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        quantized.load_state_dict({"bias": state["bias"]})


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_are_equal(copier):
    _, quantized = layer()
    x = torch.randn(3, 200)
    twin = copier(quantized)
    assert twin.is_prepacked and quantized.is_prepacked
    assert torch.equal(twin(x), quantized(x))


def test_torch_save_round_trip():
    _, quantized = layer()
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    fresh = flexq.Linear(200, 24)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.canonical()[0], quantized.canonical()[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_changing_dtype_keeps_the_scales(dtype):
    _, quantized = layer()
    before = quantized.canonical()
    quantized.to(dtype)
    assert quantized.bias.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(quantized.canonical(), before, strict=True))
    assert quantized(torch.randn(2, 200, dtype=dtype)).dtype == dtype


def test_canonical_layers_change_dtype_too():
    empty = flexq.Linear(200, 24)
    assert empty.to(torch.bfloat16).scales.dtype == torch.float16


def test_shares_a_quantized_activation():
    _, quantized = layer(bias=False)
    x = torch.randn(4, 200)
    activation = flexq.quantize_activation(x)
    y = flexq.gemm(activation, quantized._packed, None, 4, 24, 200, 8, "group", "hadamard128")
    assert torch.equal(y, quantized(x))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x must end in 200 features, got shape \[2, 100\]"):
        layer()[1](torch.randn(2, 100))


def test_compiles_without_graph_breaks():
    _, quantized = layer()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 200)
    with torch.inference_mode():
        assert torch.equal(compiled(x), quantized(x))
