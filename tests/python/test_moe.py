"""Mixture-of-experts models: their experts are quantized in every way that linear layers are."""

import copy
import io
import json
import shutil
import threading

import flexq
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, answer, distance
from flexq.checkpoint.verify import verify
from flexq.experts import Experts, ExpertsByRows, ExpertWeights
from flexq.plan import Plan
from flexq.planning import choose, costs, sensitivity
from flexq.planning.mixed import chosen_layers
from flexq.quantize import experts as found
from flexq.quantize.layers import linear_bytes, record_plan, shared_copy
from flexq.quantize.report import coverage
from safetensors.torch import load_file, save_file

KINDS = {
    a.kind: a
    for a in ARCHITECTURES
    if a.kind in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe", "glm4_moe", "llama4_text", "granitemoe")
}
WINDOWS = [torch.randint(3, 250, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
WHOLE = "model.layers.0.mlp.experts"
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str = "qwen3_moe", sharp: bool = False):
    model = KINDS[kind].model()
    if sharp:
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
    return model


def experts_in(model) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def calls_of(model, ids) -> dict[str, tuple]:
    """What each layer's experts, in floating point, are called with."""
    calls, handles = {}, []
    for name, module in found.experts_of(model).items():

        def keep(module, args, kwargs, name=name):
            calls[name] = found.positional(module, args, kwargs)

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return calls


@every_kind
def test_nearly_all_weights_are_quantized(kind):
    model = flexq.quantize_model(model_of(kind))
    assert coverage(model).share_inside > 0.95
    assert all(type(e) is (ExpertsByRows if kind == "llama4_text" else Experts) for e in experts_in(model))
    generated = model.generate(WINDOWS[0][:, :5], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 8)
    names = {n for n in model.flexq_plan.layers if ".experts." in n}
    assert names == {n for n, m in model.named_modules() if isinstance(m, ExpertWeights)}
    assert all(model.flexq_plan.layers[n] == flexq.LayerConfig() for n in names)


@every_kind
def test_computes_what_the_dequantized_weights_do(kind):
    """Module by module, where a router sends no token elsewhere because of a rounding."""
    model = model_of(kind)
    quantized = flexq.quantize_model(copy.deepcopy(model))
    calls = calls_of(model, WINDOWS[0])
    assert calls
    for name, args in calls.items():
        module, experts = model.get_submodule(name), quantized.get_submodule(name)
        with torch.no_grad():
            for projection, weight in zip(found.PROJECTIONS, experts.dequantize(), strict=True):
                getattr(module, projection).copy_(found.kind_of(module).oriented(weight))
            assert distance(experts(*args), module(*args)) < 0.02


@every_kind
def test_disk_to_disk_is_in_memory_bit_for_bit(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "float")
    plan = {"format": "flexq-plan", "version": 1, "layers": {"*.down_proj": {"scheme": "channel", "act_bits": 6}}}
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", plan)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto").eval()
    flexq.quantize_model(loaded, plan).save_pretrained(tmp_path / "saved")
    flexq.save_model(flexq.quantize_model(model, plan), tmp_path / "memory")
    on_the_fly = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=flexq.FlexQConfig(plan), device_map={"": "cpu"}
    )
    flexq.save_model(on_the_fly, tmp_path / "fly")
    expected = tensors_of(tmp_path / "disk")
    assert any(n.endswith("experts.gate_up_proj.qweight") for n in expected)
    for folder in ("memory", "saved", "fly"):
        given = tensors_of(tmp_path / folder)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[n], expected[n]) for n in expected), folder
        assert verify(tmp_path / folder).keys
    flexq.load_model(tmp_path / "disk").save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == expected.keys()


@every_kind
def test_calibrated_is_closer_than_nearest(kind):
    """By the error of each layer's experts on the tokens that they get in the float model."""
    model = model_of(kind)
    nearest = flexq.quantize_model(shared_copy(model))
    calibrated = flexq.calibrate_model(shared_copy(model), WINDOWS, weigh_tokens=False)
    projections = sum(2 * e.num_experts for e in experts_in(calibrated))
    assert sum(calibrated.flexq_plan.produced_by["experts"].values()) == projections
    first, args = next(iter(calls_of(model, WINDOWS[0]).items()))
    with torch.no_grad():
        expected = model.get_submodule(first)(*args)
        errors = [distance(m.get_submodule(first)(*args), expected) for m in (nearest, calibrated)]
    assert errors[1] < 0.9 * errors[0]


def test_experts_with_few_tokens_lean_on_others():
    model = model_of()
    module = model.get_submodule(WHOLE)
    router = model.model.layers[0].mlp.gate

    def rigged(_, args, output):  # expert 0 gets all tokens, 1 nearly all, 2 a few, 3 none
        logits, weights, ids = output
        ids = torch.tensor([0, 1]).repeat(len(ids), 1)
        ids[:3, 1] = 2
        return logits, weights, ids

    router.register_forward_hook(rigged)
    float_down = module.down_proj.detach().clone()
    flexq.calibrate_model(model, WINDOWS)
    how = model.flexq_plan.produced_by["experts"]
    assert how["leaning_on_all_tokens"] >= 2 and how["to_nearest"] >= 2
    canonical = model.get_submodule(DOWN).canonical()
    planes, scales = flexq.quantize_weight(float_down[3])
    assert torch.equal(canonical[0][3], planes) and torch.equal(canonical[1][3], scales)
    assert not torch.equal(canonical[0][2], flexq.quantize_weight(float_down[2])[0])


def test_calibration_resumes(tmp_path):
    first = flexq.calibrate_model(model_of(), WINDOWS, resume=tmp_path)
    (tmp_path / "block-0001.safetensors").unlink()
    again = flexq.calibrate_model(model_of(), WINDOWS, resume=tmp_path)
    assert torch.equal(answer(KINDS["qwen3_moe"], first), answer(KINDS["qwen3_moe"], again))
    assert first.flexq_plan.produced_by == again.flexq_plan.produced_by


def test_inputs_that_are_not_finite_are_refused():
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=f"layer {WHOLE}.* not finite"):
        flexq.calibrate_model(model, WINDOWS, weigh_tokens=False)
    assert not experts_in(model)


# ---- Plans -----------------------------------------------------------------------------------------------------------


def plan(layers):
    return flexq.Plan(layers=layers)


def test_plans_name_projections_and_wholes():
    a6, channel = flexq.LayerConfig(act_bits=6), flexq.LayerConfig(scheme="channel")
    of = flexq.quantize_model(model_of(), plan({WHOLE: a6, DOWN: channel, "*.experts": channel})).flexq_plan.layers
    assert (of[UP], of[DOWN]) == (a6, channel)
    assert of["model.layers.1.mlp.experts.gate_up_proj"] == channel
    with pytest.raises(ValueError, match="matches no linear layer"):
        flexq.quantize_model(model_of(), plan({"model.layers.9.mlp.experts": a6}))


@pytest.mark.filterwarnings("ignore:only")
def test_experts_that_are_left():
    for settings in (
        {"plan": plan({"*.experts": None})},
        {"skip": ["*.experts"]},
        {"skip": ["*.experts.*"]},
        {"include": ["*_proj"], "skip": ["*.experts"]},
    ):
        model = flexq.quantize_model(model_of(), **settings)
        assert not experts_in(model)
        assert model.flexq_plan.layers[UP] is None and model.flexq_plan.layers[DOWN] is None
    only = flexq.quantize_model(model_of(), include=["*.experts"])
    assert len(experts_in(only)) == 2 and not any(isinstance(m, flexq.Linear) for m in only.modules())
    for settings in ({"include": ["*down_proj"]}, {"skip": [UP]}, {"plan": plan({UP: None})}):
        with pytest.raises(ValueError, match=r"experts model\.layers\.0\.mlp\.experts are quantized as a whole"):
            flexq.quantize_model(model_of(), **settings)


@pytest.mark.filterwarnings("ignore:only")
def test_some_layers_experts(tmp_path):
    """What is left is stored as transformers stores it, one tensor an expert."""
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "float")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", skip=["*layers.0.mlp.experts"])
    flexq.quantize_model(model, skip=["*layers.0.mlp.experts"]).save_pretrained(tmp_path / "saved")
    flexq.save_model(model, tmp_path / "model")
    names = tensors_of(tmp_path / "disk").keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    assert "model.layers.1.block_sparse_moe.experts.gate_up_proj.qweight" in names
    for folder in ("disk", "saved", "model"):
        assert tensors_of(tmp_path / folder).keys() == names
        loaded = flexq.load_model(tmp_path / folder)
        assert torch.equal(answer(KINDS["mixtral"], loaded), answer(KINDS["mixtral"], model))
        loaded.save_pretrained(tmp_path / "again")
        assert tensors_of(tmp_path / "again").keys() == names


def test_routers_stay_unless_they_are_asked_for():
    architecture = next(a for a in ARCHITECTURES if a.kind == "qwen2_moe")
    gate = "model.layers.0.mlp.shared_expert_gate"
    model = flexq.quantize_model(architecture.model())
    assert type(model.get_submodule(gate)) is torch.nn.Linear and model.flexq_plan.layers[gate] is None
    named = flexq.quantize_model(architecture.model(), plan({gate: flexq.LayerConfig()}))
    assert isinstance(named.get_submodule(gate), flexq.Linear)


# ---- What is understood ----------------------------------------------------------------------------------------------


def test_what_computes_something_else_is_left():
    module = model_of().get_submodule(WHOLE)
    kind = found.kind_of(module)
    assert (kind.desc.function, kind.desc.interleaved, kind.transposed, kind.bias) == ("silu", False, False, False)

    class Other(type(module)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights).square()

    other = copy.deepcopy(module)
    other.__class__ = Other
    assert found.kind_of(other) is None
    relu = copy.deepcopy(module)
    relu.act_fn = torch.nn.ReLU()
    assert found.kind_of(relu) is None
    gelu = copy.deepcopy(module)
    gelu.act_fn = torch.nn.GELU(approximate="tanh")
    assert found.kind_of(gelu).desc.function == "gelu_tanh"
    oss = found.kind_of(model_of("gpt_oss").get_submodule(WHOLE))
    assert (oss.desc.alpha, oss.desc.limit, oss.desc.up_offset, oss.desc.interleaved) == (1.702, 7.0, 1.0, True)
    assert oss.transposed and oss.bias


def test_the_report_names_experts_that_are_left():
    model = model_of()
    for module in found.experts_of(model).values():
        module.act_fn = torch.nn.ReLU()
        found._kinds.pop(module)
    with pytest.warns(UserWarning, match=f"left in floating point: {UP}"):
        flexq.quantize_model(model)


# ---- As a part of PyTorch and transformers ---------------------------------------------------------------------------


def test_memory_copies_and_devices():
    model = model_of()
    before = model.get_memory_footprint()
    ids = WINDOWS[0]
    quantized = flexq.quantize_model(model).bfloat16()
    assert quantized.get_memory_footprint() < before / 2
    stored, resident = linear_bytes(quantized)
    layers = [m for m in quantized.modules() if isinstance(m, (flexq.Linear, ExpertWeights))]
    assert stored == sum(m.stored_bytes for m in layers) and resident == sum(m.weight_bytes for m in layers)
    with torch.inference_mode():
        expected = quantized(ids).logits
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        for other in (copy.deepcopy(quantized), shared_copy(quantized), torch.load(file, weights_only=False)):
            assert torch.equal(other(ids).logits, expected)
    assert shared_copy(quantized).get_submodule(WHOLE) is quantized.get_submodule(WHOLE)
    assert record_plan(quantized, flexq.Plan()).layers == quantized.flexq_plan.layers


def test_threads_share_a_model():
    model = flexq.quantize_model(model_of())
    expected, results = [model(w).logits for w in WINDOWS], {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: model(WINDOWS[i]).logits})) for i in range(len(WINDOWS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(len(WINDOWS)))


def test_base_models(tmp_path):
    flexq.quantize_model(model_of()).save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(experts_in(base)) == 2
    assert torch.isfinite(base(WINDOWS[0]).last_hidden_state).all()


def test_adapters_before_experts_train():
    from flexq.integrations.peft import for_flexq
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(flexq.quantize_model(model_of()), for_flexq(LoraConfig(r=4, target_modules=["q_proj"])))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(WINDOWS[0], labels=WINDOWS[0]).loss
        optimizer.zero_grad()
        loss.backward()
        first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.grad
        assert first is not None and first.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- Planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_planning(kind):
    reference = model_of(kind, sharp=True)
    model = flexq.quantize_model(shared_copy(reference))
    measured = sensitivity.measure(model, reference, WINDOWS[:2])
    estimated = sensitivity.estimate(model, reference, WINDOWS[:2])
    sizes = {layer.name: layer.parameters for layer in measured}
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, Experts))
    weights = experts.gate_up_proj
    assert sizes[f"{name}.gate_up_proj"] == weights.num_experts * weights.out_features * weights.in_features
    assert (
        {layer.name for layer in estimated}
        == sizes.keys()
        == model.flexq_plan.layers.keys() - {n for n, c in model.flexq_plan.layers.items() if c is None}
    )
    assert all(layer.kl > 0 for layer in estimated)
    chosen = choose.choose(shared_copy(model), reference, WINDOWS[:2], budget=0.5)
    at_8 = sum(sizes[n] for n in chosen.at_8)
    assert 0 < at_8 <= 0.5 * sum(sizes.values())


def test_costs_leave_experts_at_a8():
    reference = model_of()
    model = flexq.quantize_model(shared_copy(reference))
    measured = costs.measure_costs(model, tokens=2)
    assert not measured[UP].a6_saves and not measured[DOWN].a6_saves
    chosen = choose.choose(model, reference, WINDOWS[:1], budget=0.0, costs=measured)
    assert {UP, DOWN} <= set(chosen.at_8)


def test_the_time_of_experts_is_not_made_up():
    reference = model_of()
    configs = chosen_layers(reference, Plan.uniform())
    with pytest.raises(ValueError, match="the time of experts depends on their router and is not measured"):
        costs.measure_width_costs(reference, configs, tokens=2)


def test_experts_are_left_as_a_whole_for_a_target():
    reference = model_of(sharp=True)
    model = flexq.quantize_model(shared_copy(reference), include=["*.experts"])
    best = sensitivity.Divergence(reference, WINDOWS[:1]).mean(model)
    chosen = choose.choose(model, reference, WINDOWS[:1], target_kl=0.95 * best)
    assert len(chosen.unquantized) == 1 and chosen.unquantized[0].endswith(".experts")
    assert len(experts_in(model)) == 1 and chosen.reached <= 0.95 * best
    left = {n for n, c in model.flexq_plan.layers.items() if c is None and ".experts." in n}
    assert left == {f"{chosen.unquantized[0]}.{p}" for p in found.PROJECTIONS}


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "saved"
    flexq.quantize_model(model_of("gpt_oss")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1]}), "scales must be float16"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].flatten(0, 2)}), r"or \[E, N, G, 6, 16\] of experts"),
        (lambda t: t[f"{DOWN}.scales"].fill_(torch.nan), "scales must be finite"),
        (lambda t: t.pop(f"{DOWN}.qweight"), f"{DOWN}.qweight is missing"),
        (lambda t: t.pop(f"{DOWN}.bias"), f"{DOWN}.bias is missing"),
        (lambda t: t.update({f"{DOWN}.bias": t[f"{DOWN}.bias"][:, :-1]}), f"{DOWN}.bias is"),
        (
            lambda t: t.update({f"{UP}.{n}": t[f"{UP}.{n}"][:-1] for n in ("qweight", "scales")}),
            f"{UP}.qweight is .* the model's",
        ),
    ],
)
def test_damaged_files_are_refused(saved, tmp_path, change, message):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    tensors = tensors_of(folder)
    change(tensors)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    with flexq.checkpoint.source.opened(folder / "model.safetensors") as handle:
        metadata = handle.metadata()
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    with pytest.raises(flexq.CheckpointError, match=message):
        verify(folder)
    with pytest.raises(flexq.ModelError):
        flexq.load_model(folder)


def test_a_plan_of_one_projection_is_refused(saved, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan"]["layers"][DOWN] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(flexq.CheckpointError):
        verify(folder)
    model = model_of("gpt_oss")
    half = plan({UP: flexq.LayerConfig()})
    with pytest.raises(ValueError, match=f"names layer '{UP}' of experts, and not '{DOWN}'"):
        flexq.checkpoint.layers.insert_layers(model, half)


@every_kind
def test_weights_that_cannot_be_quantized_leave_nothing(kind, tmp_path):
    model = model_of(kind)
    name, module = next(iter(found.experts_of(model).items()))
    expected = answer(KINDS[kind], model)
    kept = module.down_proj.detach().clone()
    with torch.no_grad():
        module.down_proj[1, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=f"layer {name}.down_proj, expert 1: "):
        flexq.quantize_model(model)
    with pytest.raises(ValueError, match=f"layer {name}.down_proj, expert 1: "):
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
    with torch.no_grad():
        module.down_proj.copy_(kept)
    assert torch.equal(answer(KINDS[kind], model), expected)


def test_missing_experts_are_an_error(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "float")
    tensors = tensors_of(tmp_path / "float")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(flexq.ModelError, match="cannot be made of its parts"):
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


def test_experts_over_many_shards(tmp_path):
    """In whatever order the files have them."""
    model = model_of()
    model.save_pretrained(tmp_path / "float", max_shard_size="50KB")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    loaded = flexq.load_model(tmp_path / "disk")
    assert torch.equal(answer(KINDS["qwen3_moe"], loaded), answer(KINDS["qwen3_moe"], flexq.quantize_model(model)))


def test_experts_that_transformers_transposes(tmp_path):
    """Qwen3-VL-MoE's files have some of them transposed; those of a quantized checkpoint are what they are."""
    text = {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "vocab_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 96, "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]},
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 2, "out_hidden_size": 128,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=vision, image_token_id=250, video_token_id=251,
        vision_start_token_id=252, vision_end_token_id=253,
    )  # fmt: skip
    auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(tmp_path / "float")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    loaded = auto.from_pretrained(tmp_path / "float", quantization_config=flexq.FlexQConfig()).eval()
    loaded.save_pretrained(tmp_path / "saved")
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        for folder in ("disk", "saved"):
            again = auto.from_pretrained(tmp_path / folder).eval()
            assert torch.equal(again(input_ids=ids).logits, expected), folder
        reference = flexq.quantize_model(auto.from_pretrained(tmp_path / "float").eval())
        assert torch.equal(reference(input_ids=ids).logits, expected)
    assert len(experts_in(loaded)) == 2


def test_the_mlp_of_a_shared_expert_is_no_router():
    """Though it has as many features as there are experts."""
    config = transformers.AutoConfig.for_model(
        "qwen2_moe", vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    names = found.routers_of(transformers.AutoModelForCausalLM.from_config(config))
    assert not any("shared_expert." in name for name in names)
    assert "model.layers.0.mlp.shared_expert_gate" in names


def test_quantized_in_memory_as_loaded(tmp_path):
    """Code of some models (Jamba) asks whether the model is quantized."""
    model = flexq.quantize_model(model_of())
    flexq.save_model(model, tmp_path)
    assert model.config._is_quantized
    assert "_is_quantized" not in (tmp_path / "config.json").read_text()
