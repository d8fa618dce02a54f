"""Mixture-of-experts layers: operators against the float64 reference, `flexq.experts.Experts` as a module."""

import copy
import functools
import io
import pickle

import flexq
import pytest
import reference
import torch
from flexq import ops
from flexq.experts import Experts, quantize_experts
from flexq.plan import LayerConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import DTYPES, ROTATIONS, SCHEMES, WIDTHS, values

SHAPES = ((1, 100, 96), (3, 576, 200), (128, 100, 32))
ACTIVATIONS = (
    {},
    {"function": "gelu"},
    {"function": "gelu_tanh"},
    {"limit": 2.0},
    {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0},
)


@functools.cache
def canonical(experts, n, k, scheme, rotation, weight_bits, seed):
    weight = values(experts, n, k, seed=seed) / k**0.5
    planes, scales = quantize_experts(weight, LayerConfig(scheme=scheme, rotation=rotation, weight_bits=weight_bits))
    codes = flexq.unpack_codes(planes.flatten(0, 1)).unflatten(0, (experts, n))
    return planes, scales, codes


class Layer:
    def __init__(self, desc: ops.ExpertsDesc, bias: bool = False):
        self.desc = desc
        self.up, self.down = (
            canonical(desc.experts, *desc.shape(p), *format, desc.weight_bits(p), seed)
            for p, format, seed in (("gate_up", desc[3:5], 1), ("down", desc[6:8], 2))
        )
        self.packed = [
            ops.experts_prepack(planes, scales, p, desc)
            for p, (planes, scales, _) in (("gate_up", self.up), ("down", self.down))
        ]
        self.biases = [
            values(desc.experts, desc.shape(p)[0], seed=seed) if bias else None
            for p, seed in (("gate_up", 3), ("down", 4))
        ]

    def __call__(self, x, ids, weights, **settings):
        return ops.experts_forward(x, ids, weights, *self.packed, self.desc, *self.biases, **settings)

    def reference(self, x, ids, weights, on_input=False):
        d = self.desc
        arguments = d.gate_up_act_bits, d.gate_up_scheme, d.gate_up_rotation
        codes, scales = flexq.activation_codes(flexq.quantize_activation(x, *arguments), len(x), d.hidden, *arguments)
        weights_of = [(codes, scales) for _, scales, codes in (self.up, self.down)]
        return reference.experts(codes, scales, ids, weights, *weights_of, self.biases, x.dtype, d, on_input)


def assert_matches(y, expected, magnitude, doubt):
    """float32: the float64 values, but for fp32's sums (1e-5) and doubtful codes. In 16 bits, where a gate or up value
    may be rounded to a neighbour too, each token is close."""
    assert y.isfinite().all()
    error = (y.double() - expected).abs()
    if y.dtype == torch.float32:
        assert (error <= 1e-5 * magnitude + doubt + 1e-12).all()
    assert (error.norm(dim=1) <= 0.05 * magnitude.norm(dim=1)).all()


def routed(experts, tokens, top_k, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, top_k, generator=generator) - 0.2
    ids = torch.randint(experts, (tokens, top_k), generator=generator)  # any order, repeated ones
    if kind == "one":
        ids.fill_(experts - 1)
    if kind == "few":
        ids.remainder_(2).clamp_(max=experts - 1)
    return ids, weights


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    top_k=st.sampled_from([1, 2, 8]),
    tokens=st.sampled_from([0, 1, 7, 40]),
    kind=st.sampled_from(["any", "one", "few"]),
    schemes=st.tuples(st.sampled_from(SCHEMES), st.sampled_from(SCHEMES)),
    rotations=st.tuples(st.sampled_from(ROTATIONS), st.sampled_from(ROTATIONS)),
    bits=st.tuples(st.sampled_from([6, 8]), st.sampled_from([6, 8])),
    widths=st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)),
    activation=st.sampled_from(ACTIVATIONS),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    on_input=st.booleans(),
)
def test_forward(
    shape, top_k, tokens, kind, schemes, rotations, bits, widths, activation, interleaved, dtype, bias, on_input
):
    first, second = zip(schemes, rotations, bits, strict=True)
    of_widths = dict(zip(("gate_up_weight_bits", "down_weight_bits"), widths, strict=True))
    desc = ops.ExpertsDesc(*shape, *first, *second, **activation, interleaved=interleaved, **of_widths)
    layer = Layer(desc, bias)
    x = values(tokens, desc.hidden, seed=tokens).to(dtype)
    ids, weights = routed(desc.experts, tokens, top_k, kind)
    y = layer(x, ids, weights, weights_on_input=on_input)
    assert y.shape == x.shape and y.dtype == dtype
    assert_matches(y, *layer.reference(x, ids, weights, on_input))
    assert torch.equal(y, layer(x, ids.int(), weights, weights_on_input=on_input))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_tokens_are_each_what_they_are_alone(scheme):
    desc = ops.ExpertsDesc(3, 576, 200, gate_up_scheme=scheme, down_scheme=scheme)
    layer = Layer(desc, bias=True)
    x = values(300, 576)
    ids, weights = routed(3, 300, 8, "any")
    y = layer(x, ids, weights)
    for t in (0, 17, 299):
        alone = layer(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        assert torch.equal(alone[0], y[t])
    strided = torch.cat([x, x], 1)[:, :576].unflatten(0, (3, 100))
    assert torch.equal(layer(strided, ids.view(3, 100, 8), weights.view(3, 100, 8)), y.view(3, 100, 576))


def test_same_bits_on_any_number_of_threads():
    layer = Layer(ops.ExpertsDesc(3, 576, 200), bias=True)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 7, 300):
            x = values(tokens, 576).bfloat16()
            ids, weights = routed(3, tokens, 2, "any")
            results = []
            for threads in (1, 2, 5, 2):
                torch.set_num_threads(threads)
                results.append(layer(x, ids, weights.bfloat16()))
            assert all(torch.equal(results[0], r) for r in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_not_finite_poisons_its_token_alone(value):
    layer = Layer(ops.ExpertsDesc(3, 100, 96, limit=7.0))
    x = values(6, 100)
    ids, weights = routed(3, 6, 2, "any")
    clean = layer(x, ids, weights)
    x[2, 50] = value
    y = layer(x, ids, weights)
    others = torch.arange(6) != 2
    assert y[2].isnan().all() and torch.equal(y[others], clean[others])


def test_expert_map():
    layer = Layer(ops.ExpertsDesc(3, 100, 96), bias=True)
    x = values(20, 100)
    ids, weights = routed(7, 20, 2, "any")
    ids[3] = 6
    expert_map = torch.tensor([2, -1, 0, -1, 1, -1, -1], dtype=torch.int32)
    y = layer(x, ids, weights, expert_map=expert_map)
    local = expert_map[ids].long()
    assert_matches(y, *layer.reference(x, local, weights))
    assert (y[3] == 0).all()
    # What all devices add up to is the whole.
    other = torch.tensor([-1, 1, -1, 2, -1, 0, 1], dtype=torch.int32)
    both = layer(x, ids, weights, expert_map=expert_map) + layer(x, ids, weights, expert_map=other)
    whole = layer(x, torch.where(local >= 0, local, other[ids].long()), weights)
    torch.testing.assert_close(both, whole, rtol=1e-5, atol=1e-5)


def test_prepack_round_trip():
    layer = Layer(ops.ExpertsDesc(3, 576, 200, gate_up_scheme="channel"))
    for packed, projection, (planes, scales, _) in zip(
        layer.packed, ("gate_up", "down"), (layer.up, layer.down), strict=True
    ):
        back = ops.experts_unprepack(packed, projection, layer.desc)
        assert torch.equal(back[0], planes) and torch.equal(back[1], scales)


def test_refuses():
    layer = Layer(ops.ExpertsDesc(3, 100, 96))
    x = values(4, 100)
    ids, weights = routed(3, 4, 2, "any")

    def refuses(message, x=x, ids=ids, weights=weights, **settings):
        with pytest.raises(ValueError, match=message):
            layer(x, ids, weights, **settings)

    bad = ids.clone()
    bad[2, 1] = 3
    refuses(r"ids\[2\]\[1\] is 3; accepted are 0 to 2", ids=bad)
    bad[2, 1] = -1
    refuses(r"ids\[2\]\[1\] is -1", ids=bad)
    refuses(r"expert_map\[1\] is 7; accepted are 0 to 2", expert_map=torch.tensor([0, 7, 1], dtype=torch.int32))
    refuses("expert_map must be contiguous int32", expert_map=torch.tensor([0, 1, 2]))
    refuses(r"x must be \[..., 100\]", x=x[:, :99])
    refuses(r"ids must be int32 or int64 \[4, 'top_k'\], got torch.float32", ids=ids.float())
    refuses(r"ids must be int32 or int64 \[4, 'top_k'\]", ids=ids[:3])
    refuses("weights must be like ids", weights=weights[:, :1])
    refuses("weights must be float32, float16 or bfloat16, got torch.float64", weights=weights.double())
    refuses("x must be float32", x=x.double())
    planes, scales, _ = layer.up
    with pytest.raises(ValueError, match=r"planes of gate_up must be uint8 \[3, 192, 1, 6, 16\]"):
        ops.experts_prepack(planes[:2], scales, "gate_up", layer.desc)
    with pytest.raises(ValueError, match="projection must be 'gate_up' or 'down', got 'up'"):
        ops.experts_prepack(planes, scales, "up", layer.desc)
    with pytest.raises(ValueError, match="function must be 'silu', 'gelu' or 'gelu_tanh', got 'relu'"):
        ops.experts_prepack(planes, scales, "gate_up", layer.desc._replace(function="relu"))
    scales = scales.clone()
    scales[1, 17] = torch.nan
    with pytest.raises(ValueError, match="the scale of expert 1, row 17, group 0 is nan"):
        ops.experts_prepack(planes, scales, "gate_up", layer.desc)


# ---- The module ------------------------------------------------------------------------------------------------------


def weights_of(experts=5, hidden=128, intermediate=96):
    up = values(experts, 2 * intermediate, hidden, seed=5) / hidden**0.5
    return up, values(experts, hidden, intermediate, seed=6) / intermediate**0.5


def module(**settings) -> Experts:
    return Experts.from_float(*weights_of(), **settings)


def inputs(tokens=11, hidden=128, experts=5, top_k=2, dtype=torch.float32):
    ids, weights = routed(experts, tokens, top_k, "any")
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype), ids, weights.to(dtype)


def relative(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_close_to_float(activation):
    up, down = weights_of()
    experts = Experts.from_float(up, down, interleaved=True, down_config=LayerConfig(scheme="channel"), **activation)
    assert relative(experts(*inputs()), experts.float_forward(*inputs())) < 0.02
    assert all(relative(a, b) < 0.06 for a, b in zip(experts.dequantize(), (up, down), strict=True))


def transformers_models():
    import transformers.models.gpt_oss.modeling_gpt_oss as gpt_oss
    import transformers.models.mixtral.modeling_mixtral as mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen
    from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

    sizes = {"hidden_size": 128, "num_experts_per_tok": 2, "num_local_experts": 5, "experts_implementation": "eager"}
    yield mixtral.MixtralExperts(MixtralConfig(intermediate_size=96, **sizes)), {}
    yield qwen.Qwen3MoeExperts(Qwen3MoeConfig(moe_intermediate_size=96, num_experts=5, **sizes)), {}
    oss = gpt_oss.GptOssExperts(GptOssConfig(intermediate_size=96, **sizes))
    yield oss, {"alpha": oss.alpha, "limit": oss.limit, "up_offset": 1.0, "interleaved": True}


@pytest.mark.parametrize("which", range(3), ids=("mixtral", "qwen3_moe", "gpt_oss"))
def test_computes_what_transformers_does(which):
    torch.manual_seed(0)
    original, activation = list(transformers_models())[which]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    up, down = original.gate_up_proj, original.down_proj
    biases = ()
    if getattr(original, "has_bias", False):
        biases = original.gate_up_proj_bias, original.down_proj_bias
    if getattr(original, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    experts = Experts.from_float(up, down, *biases, **activation)
    expected = original(*inputs())
    assert relative(experts(*inputs()), expected) < 0.05
    with torch.no_grad():
        exact = copy.deepcopy(original)
        up, down = experts.dequantize()
        transposed = getattr(original, "is_transposed", False)
        exact.gate_up_proj.copy_(up.transpose(1, 2) if transposed else up)
        exact.down_proj.copy_(down.transpose(1, 2) if transposed else down)
        torch.testing.assert_close(experts.float_forward(*inputs()), exact(*inputs()), rtol=1e-4, atol=1e-4)


def test_one_copy_is_resident():
    experts = module()
    assert experts.is_prepacked and experts.gate_up_proj.qweight.numel() == 0
    assert experts.stored_bytes == 5 * (192 + 128) * 98
    assert experts.weight_bytes <= experts.stored_bytes + 2 * 5 * 64
    assert "W6A8, scheme=group" in repr(experts) and "function=silu" in repr(experts)


def test_state_dict_is_canonical_and_loads():
    experts = module(gate_up_bias=torch.randn(5, 192), down_bias=torch.randn(5, 128))
    state = experts.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "gate_up_proj.bias": (torch.float32, (5, 192)),
        "gate_up_proj.qweight": (torch.uint8, (5, 192, 1, 6, 16)),
        "gate_up_proj.scales": (torch.float16, (5, 192, 1)),
        "down_proj.bias": (torch.float32, (5, 128)),
        "down_proj.qweight": (torch.uint8, (5, 128, 1, 6, 16)),
        "down_proj.scales": (torch.float16, (5, 128, 1)),
    }
    expected = experts(*inputs())
    for fresh in (Experts(5, 128, 96, bias=True), copy.deepcopy(experts)):
        fresh.load_state_dict(state)
        assert torch.equal(fresh(*inputs()), expected)
    with pytest.raises(RuntimeError, match=r"gate_up_proj.scales must be torch.float16, got torch.float32"):
        Experts(5, 128, 96, bias=True).load_state_dict(
            state | {"gate_up_proj.scales": state["gate_up_proj.scales"].float()}
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        experts.load_state_dict({k: v for k, v in state.items() if "down" not in k})


def test_an_expert_is_a_slice():
    experts = module()
    up, down = experts.gate_up_proj.canonical(), experts.down_proj.canonical()
    few = Experts.from_canonical([t[2:4] for t in up], [t[2:4] for t in down], 96)
    x, ids, weights = inputs()
    local = ids.clamp(2, 3)
    assert torch.equal(few(x, local - 2, weights), experts(x, local, weights))
    linear = flexq.dequantize_weight(up[0][2], up[1][2], 128)
    assert torch.equal(experts.dequantize()[0][2], linear)


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_are_equal(copier):
    experts = module(limit=7.0)
    twin = copier(experts)
    assert twin.is_prepacked and experts.is_prepacked
    assert torch.equal(twin(*inputs()), experts(*inputs()))


def test_torch_save_round_trip():
    experts = module()
    file = io.BytesIO()
    torch.save(experts.state_dict(), file)
    file.seek(0)
    fresh = Experts(5, 128, 96)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(*inputs()), experts(*inputs()))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_changing_dtype_keeps_the_scales(dtype):
    experts = module(down_bias=torch.randn(5, 128))
    before = experts.state_dict()
    experts.to(dtype)
    after = experts.state_dict()
    assert experts.is_prepacked and after["down_proj.bias"].dtype == dtype
    assert all(torch.equal(after[k], before[k]) for k in before if "bias" not in k)
    assert experts(*inputs(dtype=dtype)).dtype == dtype
    assert Experts(5, 128, 96).to(dtype).gate_up_proj.scales.dtype == torch.float16


def test_meta_layers_wait_for_their_weights():
    experts = Experts(5, 128, 96, device="meta").prepack()
    assert not experts.is_prepacked and experts.gate_up_proj.qweight.is_meta


def test_act_bits_can_change():
    experts = module()
    eight = experts(*inputs())
    experts.down_proj.config = LayerConfig(act_bits=6)
    six = experts(*inputs())
    assert not torch.equal(six, eight)
    assert torch.equal(six, module(down_config=LayerConfig(act_bits=6))(*inputs()))


@pytest.mark.parametrize("on_input", (False, True))
def test_gradients(on_input):
    experts = module(weights_on_input=on_input, limit=7.0, down_bias=torch.randn(5, 128))
    x, ids, weights = inputs()
    x.requires_grad_()
    weights.requires_grad_()
    experts(x, ids, weights).square().sum().backward()
    got = x.grad.clone(), weights.grad.clone()
    x.grad = weights.grad = None
    experts.float_forward(x, ids, weights).square().sum().backward()
    assert relative(got[0], x.grad) < 0.05 and relative(got[1], weights.grad) < 0.05


def test_wrong_input_is_named():
    x, ids, weights = inputs(hidden=100)
    with pytest.raises(ValueError, match=r"hidden_states must end in 128 features, got shape \[11, 100\]"):
        module()(x, ids, weights)


def test_compiles_without_graph_breaks():
    experts = module(gate_up_bias=torch.randn(5, 192))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(*inputs()), experts(*inputs()))


def test_fake_implementations():
    layer = Layer(ops.ExpertsDesc(3, 100, 96, down_scheme="channel"), bias=True)
    ids, weights = routed(3, 4, 2, "any")
    torch.library.opcheck(
        torch.ops.flexq.experts_forward.default,
        (values(4, 100), ids, weights, *layer.packed, *layer.biases, None, False, *layer.desc),
        test_utils=("test_schema", "test_faketensor"),
    )
    for packed, p, (planes, scales, _) in zip(layer.packed, ("gate_up", "down"), (layer.up, layer.down), strict=True):
        for name, tensors in (("prepack", (planes, scales)), ("unprepack", (packed,))):
            torch.library.opcheck(
                getattr(torch.ops.flexq, f"experts_{name}").default,
                (*tensors, p, *layer.desc),
                test_utils=("test_schema", "test_faketensor"),
            )
