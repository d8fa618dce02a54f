"""What each device has of a checkpoint's experts, without a server: together they compute what all in one place do."""

from types import SimpleNamespace

import flexq
import pytest
import torch
from flexq.experts import Experts
from flexq.integrations.vllm_experts import CheckpointExpertsMethod, name_in, names_of_experts

E, H, INNER, T, K = 4, 256, 512, 9, 2


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(scheme: str, activation: str, weight_bits: int = 6) -> Experts:
    config = flexq.LayerConfig(scheme=scheme, weight_bits=weight_bits)
    biases = (values(E, 2 * INNER, seed=3), values(E, H, seed=4))
    settings = {"alpha": 1.702, "limit": 7.0, "up_offset": 1.0} if activation != "silu" else {}
    return Experts.from_float(
        values(E, 2 * INNER, H, seed=1) / 16, values(E, H, INNER, seed=2) / 16, *biases, config,
        interleaved=activation == "swigluoai", **settings,
    )  # fmt: skip


def tensors_of(experts: Experts) -> list[tuple[str, torch.Tensor]]:
    return list(experts.state_dict().items())


def part(experts: Experts, tensors, activation: str, rank: int, ranks: int, expert_map=None) -> torch.nn.Module:
    """One of vLLM's layers, as far as the method looks at it, with its weights loaded."""
    here = INNER // ranks
    moe = SimpleNamespace(tp_rank=rank, tp_size=ranks, has_bias=True, intermediate_size_per_partition=here)
    layer = torch.nn.Module()
    layer.activation, layer.moe_config, layer.global_num_experts = activation, moe, E
    layer.expert_map = expert_map
    count = E if expert_map is None else int((expert_map >= 0).sum())
    config = experts.gate_up_proj.config
    name = "model.layers.0.mlp.experts"
    method = CheckpointExpertsMethod(moe, name, config, config, of_checkpoint=name, check=lambda: None)
    method.create_weights(layer, count, H, here, torch.float32)
    list(layer.load_weights(tensors))
    method.process_weights_after_loading(layer)
    layer.flexq_method = method
    return layer


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:K] for i in range(T)])
    return values(T, H, seed=5), values(T, K, seed=6).softmax(-1), ids


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "swigluoai_uninterleave"])
@pytest.mark.parametrize(("scheme", "weight_bits"), [("group", 6), ("group", 4), ("channel", 6), ("channel", 8)])
def test_parts_of_each_expert(scheme, weight_bits, activation):
    experts = whole(scheme, activation, weight_bits)
    x, weights, ids = routing()
    parts = [part(experts, tensors_of(experts), activation, rank, 2) for rank in range(2)]
    assert not any(list(p.parameters()) for p in parts)  # what sleep of level 2 would lose, and no reload brings back
    y = sum(p.flexq_method.apply(p, x, weights, ids) for p in parts)
    expected, exact = experts(x, ids, weights), experts.float_forward(x, ids, weights)
    if scheme == "group":
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    else:  # h has a scale per token on each device, a finer one than that of all of it
        assert (y - exact).norm() <= 1.05 * (expected - exact).norm()


def test_some_experts_on_each_device():
    experts = whole("group", "silu")
    x, weights, ids = routing()
    maps = [torch.tensor(m, dtype=torch.int32) for m in ([-1, 1, 0, -1], [0, -1, -1, 1])]  # in any order
    parts = [part(experts, tensors_of(experts), "silu", 0, 1, expert_map) for expert_map in maps]
    y = sum(p.flexq_method.apply(p, x, weights, ids) for p in parts)
    assert torch.allclose(y, experts(x, ids, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("down_proj.scales"), "w2_scales did not come"),
        (lambda t: t.update({"gate_up_proj.qweight": t["gate_up_proj.qweight"][:3]}), r"\[4, 1024, 2, 6, 16\], got"),
        (lambda t: t.update({"down_proj.scales": t["down_proj.scales"].float()}), "torch.float16"),
        (lambda t: t.update({"down_proj.weight": t["down_proj.scales"]}), "no such tensor"),
        (lambda t: t["down_proj.scales"].fill_(float("nan")), "scale"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    experts = whole("group", "silu")
    tensors = dict(tensors_of(experts))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        part(experts, list(tensors.items()), "silu", 0, 1)


def test_groups_that_cannot_be_split():
    experts = whole("group", "silu")
    with pytest.raises(ValueError, match="down_proj"):
        part(experts, tensors_of(experts), "silu", 0, 8)


@pytest.mark.parametrize(
    "projections", [("gate_up_proj", "down_proj"), ("w13_weight", "w2_weight"), ("gate_up_proj", "w2")]
)
def test_settings_by_name(projections):
    """vLLM renames some, and calls the module around experts otherwise."""
    names = tuple(f"model.layers.1.mlp.experts.{projection}" for projection in projections)
    layers = dict.fromkeys(names, flexq.LayerConfig())
    assert names_of_experts(layers, "model.layers.1.block_sparse_moe.experts") == names
    assert names_of_experts(layers, "model.layers.11.mlp.experts") is None


def test_experts_with_one_module_more_around_them():
    """Gemma 4's. Of two that may be meant the one of that very name is, or none."""
    layers = {
        f"model.layers.1.experts.{projection}": flexq.LayerConfig() for projection in ("gate_up_proj", "down_proj")
    }
    assert names_of_experts(layers, "model.layers.1.moe.experts") == tuple(layers)
    assert name_in(layers, "model.layers.1.moe.experts") == "model.layers.1.experts"
    others = {name.replace("experts", "other.experts"): config for name, config in layers.items()}
    assert names_of_experts(layers | others, "model.layers.1.other.experts") == tuple(others)
    with pytest.raises(ValueError, match="either may be meant"):
        names_of_experts(layers | others, "model.layers.1.moe.experts")
