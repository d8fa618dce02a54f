"""Plans and quantize_model."""

import copy
import json

import flexq
import pytest
import torch
from architectures import architecture
from conftest import tiny_config
from flexq.quantize.layers import linear_layers
from torch import nn
from transformers import LlamaForCausalLM


def kinds(model) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, (nn.Linear, flexq.Linear))}


def test_default_quantizes_everything_but_the_head(tiny_llama):
    model = flexq.quantize_model(tiny_llama)
    assert [n for n, kind in kinds(model).items() if kind == "Linear" and "lm_head" not in n]
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.model.embed_tokens.weight
    layers = [m for m in model.modules() if isinstance(m, flexq.Linear)]
    assert len(layers) == 14 and {layer.config for layer in layers} == {flexq.LayerConfig()}


def test_paper_recipe(tiny_llama):
    model = flexq.quantize_model(tiny_llama, "paper")
    for name, module in model.named_modules():
        if isinstance(module, flexq.Linear):
            bits = 8 if name.endswith("down_proj") else 6
            assert module.config == flexq.LayerConfig(act_bits=bits, rotation="none")


def test_json_round_trip(tiny_llama, tmp_path):
    plan = flexq.Plan(
        flexq.LayerConfig(act_bits=6),
        {"*.down_proj": flexq.LayerConfig(act_bits=8), "model.layers.0.self_attn.q_proj": None},
        {"by": "hand"},
    )
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["layers"] == {"*.down_proj": {"act_bits": 8}, "model.layers.0.self_attn.q_proj": None}
    assert flexq.Plan.load(tmp_path / "plan.json") == plan
    model = flexq.quantize_model(tiny_llama, str(tmp_path / "plan.json"))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.model.layers[1].mlp.down_proj.config.act_bits == 8
    assert model.flexq_plan.layers["model.layers.0.self_attn.q_proj"] is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, '"format" must be'),
        ({"format": "flexq-plan", "version": 2}, "plan version must be 1, got 2"),
        ({"defaults": {"act_bits": 7}}, "plan defaults: act_bits must be 6 or 8, got 7"),
        ({"defaults": {"bits": 7}}, "unknown setting 'bits'"),
        ({"layers": {"a": {"scheme": "row"}}}, "plan layer 'a': scheme must be"),
        ({"layers": [1]}, "plan layers must be an object"),
        ({"layer": {}}, "unknown field 'layer'"),
        ({"defaults": {"weight_bits": 7}}, "weight_bits must be 4, 5, 6 or 8, got 7"),
    ],
)
def test_bad_plans(data, message):
    if data and "format" not in data:
        data = {"format": "flexq-plan", "version": 1} | data
    with pytest.raises(ValueError, match=message):
        flexq.Plan.from_dict(data)


def test_names_that_do_not_exist(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"plan names 'model\.layers\.9'"):
        flexq.quantize_model(tiny_llama, flexq.Plan(layers={"model.layers.9": flexq.LayerConfig()}))
    with pytest.raises(ValueError, match=r"pattern 'nothing\*' matches no linear layer"):
        flexq.quantize_model(tiny_llama, skip=["nothing*"])
    with pytest.raises(ValueError, match="neither a file nor one of w6a8, w6a6, paper"):
        flexq.quantize_model(tiny_llama, "w4a4")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        flexq.quantize_model(tiny_llama, str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text('{"layers": {"*.up_proj": {"act_bits": 6}, "*.up_proj": {"act_bits": 8}}}')
    with pytest.raises(ValueError, match=r"x\.json: '\*\.up_proj' is there twice"):
        flexq.Plan.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"format": "flexq-plan", "version": 1, "defaults": {"act_bits": 7}}')
    with pytest.raises(ValueError, match=r"x\.json: plan defaults: act_bits must be 6 or 8, got 7"):
        flexq.Plan.load(tmp_path / "x.json")
    checkpoint = {"model_type": "llama", "quantization_config": {"plan": flexq.Plan.named("w6a6").to_dict()}}
    (tmp_path / "x.json").write_text(json.dumps(checkpoint))
    assert flexq.Plan.load(tmp_path / "x.json") == flexq.Plan.named("w6a6")
    with pytest.raises(ValueError, match="an LM head goes by its exact name"):
        flexq.quantize_model(tiny_llama, flexq.Plan(layers={"*head": flexq.LayerConfig()}))
    assert len(linear_layers(tiny_llama)) == 14


def test_a_recorded_plan_serves_again():
    """It names routers as left, which are linear only beside others."""
    model = architecture("qwen2_moe-CausalLM").model()
    assert flexq.quantize_model(copy.deepcopy(model)).flexq_plan.layers["model.layers.0.mlp.shared_expert_gate"] is None
    again = flexq.quantize_model(copy.deepcopy(model), flexq.quantize_model(copy.deepcopy(model)).flexq_plan)
    assert again.flexq_plan.fingerprint() == flexq.quantize_model(model).flexq_plan.fingerprint()
    with pytest.raises(ValueError, match="no_such_layer"):
        flexq.quantize_model(
            architecture("qwen2_moe-CausalLM").model(), flexq.Plan(layers={"model.no_such_layer": None})
        )


def test_include_and_skip(tiny_llama):
    model = flexq.quantize_model(tiny_llama, include=["*.mlp.*"], skip=["*.layers.1.*"])
    quantized = [n for n, m in model.named_modules() if isinstance(m, flexq.Linear)]
    assert quantized == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]


def test_quantizing_twice_says_so(tiny_llama):
    model = flexq.quantize_model(tiny_llama)
    with pytest.raises(ValueError, match="14 layers are quantized already"):
        flexq.quantize_model(model)


def test_a_bad_weight_names_its_layer_and_leaves_the_model(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: weight\[3\]\[4\] is inf"):
        flexq.quantize_model(tiny_llama)
    assert not any(isinstance(m, flexq.Linear) for m in tiny_llama.modules())


def test_shared_layers_stay_shared():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 8)})
    flexq.quantize_model(model)
    assert model["a"] is model["b"] and isinstance(model["a"], flexq.Linear)


def test_tied_and_special_linears_are_left():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 64), "out": nn.Linear(64, 10, bias=False)})
    model["out"].weight = model["embed"].weight
    model["attention"] = nn.MultiheadAttention(64, 4)
    with pytest.raises(ValueError, match="no layer of the model was left to quantize"):
        flexq.quantize_model(model)


def test_progress_sees_every_layer(tiny_llama):
    seen = []

    def progress(layers):
        for layer in layers:
            seen.append(layer)
            yield layer

    flexq.quantize_model(tiny_llama, progress=progress)
    assert len(seen) == 14


@pytest.mark.parametrize("tied", (True, False))
def test_logits_match_an_emulation_in_float64(tied):
    """The packed model, by the library's kernels, against the same codes and scales in float64, layer by layer."""
    import reference

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()
    flexq.quantize_model(model, "w6a6")
    ids = torch.randint(0, 128, (2, 17))
    captured = {}

    def capture(name):
        return lambda module, inputs, output: captured.__setitem__(name, (module, inputs[0], output))

    handles = [m.register_forward_hook(capture(n)) for n, m in model.named_modules() if isinstance(m, flexq.Linear)]
    with torch.inference_mode():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    assert logits.isfinite().all() and len(captured) == 14
    for module, x, y in captured.values():
        rows = x.reshape(-1, x.shape[-1])
        codes, scales = reference.quantize_activation(rows, 6, "group", "hadamard128")
        planes, weight_scales = module.canonical()
        expected, magnitude = reference.product(codes.flatten(1), scales, flexq.unpack_codes(planes), weight_scales)
        # A code next to a rounding boundary may differ by one step from the float64 emulation's.
        step = (scales.amax(-1, keepdim=True) * module.dequantize().double().abs().amax(-1)) * 2
        assert ((y.reshape_as(expected).double() - expected).abs() <= 1e-5 * magnitude + step).all()
        assert ((y.reshape_as(expected).double() - expected).norm() / expected.norm()) < 2e-3
