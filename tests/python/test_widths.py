"""Models whose layers have weights of several widths, through everything that a model goes through."""

import json

import flexq
import pytest
import torch
from conftest import tiny_config
from flexq.checkpoint.source import CheckpointError
from flexq.checkpoint.verify import verify
from flexq.plan import LayerConfig, Plan
from flexq.quantize.layers import shared_copy
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

IDS = torch.arange(20).view(1, -1)
BITS = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 5, "gate_proj": 4, "up_proj": 6, "down_proj": 5}


def mixed_plan(scheme: str = "group") -> Plan:
    """Widths by name, and q/k/v of one, gate and up of two."""
    layers = {f"*.{name}": LayerConfig(scheme=scheme, weight_bits=bits) for name, bits in BITS.items()}
    return Plan(LayerConfig(scheme=scheme), layers)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def bits_of(model) -> dict[str, int]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, flexq.Linear)}
    return {name.rpartition(".")[2]: layer.config.weight_bits for name, layer in layers.items()}


@pytest.mark.parametrize("scheme", ("group", "channel"))
def test_checkpoints_round_trip(tiny_llama, tiny_folder, tmp_path, scheme):
    """In memory and from disk to disk the same, loaded by FlexQ and by transformers."""
    flexq.quantize_checkpoint(tiny_folder, tmp_path / "disk", mixed_plan(scheme))
    model = flexq.quantize_model(tiny_llama, mixed_plan(scheme))
    assert bits_of(model) == BITS
    flexq.save_model(model, tmp_path / "memory")
    for folder in (tmp_path / "disk", tmp_path / "memory"):
        assert verify(folder).keys
        loaded = flexq.load_model(folder)
        assert torch.equal(logits(loaded), logits(model)) and bits_of(loaded) == BITS
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))
        with safe_open(next(folder.glob("*.safetensors")), framework="pt") as file:
            assert file.get_slice("model.layers.0.mlp.gate_proj.qweight").get_shape() == [200, 1, 4, 16]


def test_quantizing_on_the_way(tiny_llama, tiny_folder):
    from flexq.integrations.transformers import FlexQConfig

    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=FlexQConfig(mixed_plan())).eval()
    assert torch.equal(logits(loaded), logits(flexq.quantize_model(tiny_llama, mixed_plan())))


def test_a_plan_of_other_widths_is_refused(tiny_llama, tmp_path):
    folder = flexq.save_model(flexq.quantize_model(tiny_llama, mixed_plan()), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan"]["layers"]["model.layers.0.mlp.gate_proj"] = {"weight_bits": 5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the plan in config\.json is not the one"):
        flexq.load_model(folder)


def test_planes_of_another_width_are_refused(tmp_path):
    """Where files have no hash of the plan, as those of `save_pretrained` of others may."""
    from flexq.checkpoint.verify import _check_layers

    plan = Plan(layers={"a": LayerConfig(weight_bits=5)})
    with pytest.raises(CheckpointError, match=r"a.qweight must be uint8 \[N, G, 5, 16\], .* got \[8, 2, 6, 16\]"):
        _check_layers(tmp_path, plan, {"a.qweight": (8, 2, 6, 16), "a.scales": (8, 2)})


def test_calibration(tiny_llama, tmp_path):
    """A mixed plan is calibrated, and stays closer than rounding to nearest on its text."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 128, (1, 60), generator=generator) for _ in range(4)]
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(10)

    def distance(model) -> float:
        with torch.inference_mode():
            pairs = [[m(w).logits.double().log_softmax(-1) for m in (model, tiny_llama)] for w in windows]
        return sum((b.exp() * (b - a)).sum().item() for a, b in pairs)

    nearest = flexq.quantize_model(shared_copy(tiny_llama), mixed_plan("channel"))
    model = flexq.calibrate_model(shared_copy(tiny_llama), windows, mixed_plan("channel"), resume=tmp_path)
    assert bits_of(model) == BITS
    assert distance(model) < 0.7 * distance(nearest)
    again = flexq.calibrate_model(shared_copy(tiny_llama), windows, mixed_plan("channel"), resume=tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_layers_of_one_width_are_merged(tiny_llama):
    model = flexq.quantize_model(tiny_llama, mixed_plan())
    before = logits(model)
    fusion = flexq.fuse_model(model, kernels=True)
    assert [names for names in fusion.merged if len(names) > 1] == [
        [f"model.layers.{i}.self_attn.{part}_proj" for part in "qkv"] for i in (0, 1)
    ]
    assert fusion.mlps == [] and len(fusion.norms) == 2  # those before q/k/v
    torch.testing.assert_close(logits(model), before, rtol=1e-2, atol=1e-2)
    assert torch.equal(logits(flexq.unfuse_model(model)), before)


@pytest.mark.parametrize("weight_bits", (4, 5, 8))
def test_fused_kernels_of_each_width(weight_bits):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=128, intermediate_size=256)).eval()
    flexq.quantize_model(model, Plan.uniform(weight_bits=weight_bits))
    before = logits(model)
    fusion = flexq.fuse_model(model, kernels=True)
    assert len(fusion.mlps) == 2 and len(fusion.norms) == 4 and len(fusion.layers) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-2, atol=1e-2)


def test_experts(tmp_path):
    config = MixtralConfig(
        vocab_size=128, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")
    plan = Plan(
        layers={
            "*.experts.gate_up_proj": LayerConfig(weight_bits=4),
            "*.experts.down_proj": LayerConfig(weight_bits=8, scheme="channel"),
        }
    )
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", plan)
    model = flexq.quantize_model(model, plan)
    experts = model.model.layers[0].mlp.experts
    assert [p.config.weight_bits for p in (experts.gate_up_proj, experts.down_proj)] == [4, 8]
    assert experts.gate_up_proj.stored_bytes == 4 * 256 * (64 + 2)
    flexq.save_model(model, tmp_path / "memory")
    for folder in (tmp_path / "disk", tmp_path / "memory"):
        assert torch.equal(logits(flexq.load_model(folder)), logits(model))
