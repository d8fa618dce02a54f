"""How vLLM holds FlexQ's weights: nothing twice, loaded again in place, made up; and which layers a plan is for."""

import copy
import gc
from types import SimpleNamespace

import flexq
import pytest
import torch
from engines import assert_same, engine, greedy, random_model, shut
from flexq.integrations import vllm as plugin
from flexq.integrations import vllm_loading, vllm_names
from flexq.integrations.vllm_loading import order_of_rows
from plans import MIXED
from transformers import AutoTokenizer
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.utils import WeightsMapper

PROMPTS = ["The capital of France is", "Water boils at"]


@pytest.fixture(scope="module")
def folders(random_float, tmp_path_factory):
    """Two models of one architecture with other weights and biases, in floating point and quantized, embeddings too."""
    tokenizer, folder = AutoTokenizer.from_pretrained(random_float), tmp_path_factory.mktemp("weights")
    model, plan = random_model("qwen2", len(tokenizer)), flexq.Plan(MIXED.defaults, MIXED.layers, {}, 8)
    made = {}
    for which in ("first", "second"):
        made[which] = folder / which, folder / f"{which}-quantized"
        model.save_pretrained(made[which][0])
        tokenizer.save_pretrained(made[which][0])
        flexq.quantize_checkpoint(*made[which], plan)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return made


def canonical_tensors(_) -> int:
    """How many tensors like a checkpoint's planes are in memory."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return sum(t.dtype == torch.uint8 and t.dim() == 4 and t.shape[-1] == 16 and not t.is_meta for t in tensors)


@pytest.mark.parametrize("is_checkpoint", [True, False])
def test_weights_are_reloaded_in_place(folders, tmp_path, is_checkpoint, monkeypatch, own_process):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    (first, second), options = (folders[which][is_checkpoint] for which in folders), {}
    if not is_checkpoint:
        options["quantization"] = "flexq"
    expected = second
    if not is_checkpoint:
        expected = tmp_path / "expected"
        flexq.quantize_checkpoint(second, expected, "w6a8")
    tokenizer = AutoTokenizer.from_pretrained(first)
    llm = engine(first, **options)
    try:
        before = greedy(llm, PROMPTS)
        assert llm.apply_model(canonical_tensors) == [0]  # neither in the layers nor in what vLLM keeps of them
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        after = greedy(llm, PROMPTS)
    finally:
        shut(llm)
    assert [tokens for tokens, _ in before] != [tokens for tokens, _ in after]
    assert_same(expected, [tokenizer(prompt).input_ids for prompt in PROMPTS], after)


def test_weights_are_made_up(random_mixed):
    llm = engine(random_mixed, load_format="dummy")
    try:
        assert [len(tokens) for tokens, _ in greedy(llm, PROMPTS, 3)] == [3, 3]
    finally:
        shut(llm)


def test_experts_are_not_reloaded(monkeypatch):
    from flexq.integrations.vllm_experts import _without_experts

    class Loader:
        def get_all_weights(self, model_config, model):
            return iter([("a", torch.ones(1))])

    monkeypatch.setattr(vllm_loading, "DefaultModelLoader", Loader)
    for _ in range(2):
        vllm_loading.have_loader_pass(_without_experts)
    assert Loader.get_all_weights.flexq_stages == (_without_experts,)
    model = torch.nn.Module()
    assert [name for name, _ in Loader().get_all_weights(None, model)] == ["a"]
    model.flexq_experts = torch.nn.Module()
    with pytest.raises(RuntimeError, match="start the server anew"):
        Loader().get_all_weights(None, model)  # before anything is asked of it


def test_plans_have_compiled_graphs_of_their_own():
    """vLLM's key knows the quantization by its name alone."""
    plans = [flexq.Plan.uniform(act_bits=bits) for bits in (8, 6, 8)]

    def keys(**options) -> list[str]:
        found = []
        for plan in plans:
            config = VllmConfig(**options)
            with set_current_vllm_config(config):
                for _ in range(2):
                    plugin.have_vllm_tell_plans_apart(plugin.FlexQVllmConfig(plan)._hash_of_plan)
            found.append(config.compute_hash())
        return found

    for options in ({}, {"additional_config": {"of": "another"}}):
        eight, six, again = keys(**options)
        assert eight == again != six
    config, hashes = VllmConfig(), set()
    config.additional_config = SimpleNamespace(compute_hash=lambda: "x", of="another")
    with set_current_vllm_config(config):
        for plan in plans:
            plugin.have_vllm_tell_plans_apart(plugin.FlexQVllmConfig(plan)._hash_of_plan)
            hashes.add(copy.deepcopy(config.additional_config).compute_hash())
    assert len(hashes) == 2 and config.additional_config.of == "another"


# ---- Which layers a plan is for --------------------------------------------------------------------------------------


def config_of(monkeypatch, tmp_path, **plan) -> plugin.FlexQVllmConfig:
    """Of a model that is quantized on the way."""
    flexq.Plan(**plan).save(tmp_path / "plan.json")
    monkeypatch.setenv("FLEXQ_PLAN", str(tmp_path / "plan.json"))
    config = plugin.FlexQVllmConfig()
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    return config


def linear() -> LinearBase:
    return LinearBase.__new__(LinearBase)


class FusedMoEOfATest(torch.nn.Module):
    activation = "silu"
    moe_config = SimpleNamespace(tp_rank=0, tp_size=1)


def test_parts_that_the_checkpoint_has_as_one():
    """Qwen3.5 has two layers in what vLLM makes four parts of."""
    one, other = flexq.LayerConfig(), flexq.LayerConfig(act_bits=6)
    names = ["in_proj_qkv", "in_proj_z"]
    layer = SimpleNamespace(flexq_sizes=[128, 128, 256, 256], flexq_loaded=set())
    config = plugin.FlexQVllmConfig(flexq.Plan())
    method = config._method_of_linear("x.in_proj_qkvz", [one] * len(names))
    assert method._runs(layer) == [(768, one)]
    for tensor in ("qweight", "scales"):
        layer.flexq_loaded.add((tensor, (0, 1, 2)))
    with pytest.raises(ValueError, match=r"of 4 parts only \['0', '1', '2'\]"):
        method._check_complete(layer)
    layer.flexq_loaded |= {("qweight", 3), ("scales", 3)}
    method._check_complete(layer)
    with pytest.raises(ValueError, match="vLLM makes 4 parts of 2 layers"):
        config._method_of_linear("x.in_proj_qkvz", [one, other])._runs(layer)


def test_layers_that_are_not_read_are_refused():
    """They are on the meta device until their loaders are called."""
    from flexq.integrations.vllm_weights import require_read
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    layer = torch.nn.Module()
    with pytest.raises(ValueError, match=r"x\.up_proj: no weight was read into it"):
        require_read(layer, "x.up_proj")
    get_layerwise_info(layer).loaded_weights.append(("weight", None))
    require_read(layer, "x.up_proj")


def test_names_that_mappers_know_by_what_is_in_them():
    mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )
    names = ["model.language_model.layers.0.mlp.up_proj", "lm_head", "other"]
    assert [vllm_names.name_by(mapper, name) for name in names] == [
        "language_model.model.layers.0.mlp.up_proj", "language_model.lm_head", "other",
    ]  # fmt: skip


def test_encoders_of_images_and_sound_stay(monkeypatch, tmp_path):
    config = config_of(monkeypatch, tmp_path)
    for name in ("vision_tower.blocks.0.fc1", "model.visual.blocks.3.attn.qkv", "audio_tower.layers.1.fc2",
                 "multi_modal_projector.linear_1", "vpm.encoder.layers.0.mlp.fc1", "resampler.kv_proj",
                 "model.connector.modality_projection"):  # fmt: skip
        assert isinstance(config.get_quant_method(linear(), name), UnquantizedLinearMethod)
    name = "language_model.model.layers.0.mlp.down_proj"
    assert isinstance(config.get_quant_method(linear(), name), plugin.FlexQLinearMethod)


def test_projections_of_experts_have_settings_of_their_own(monkeypatch, tmp_path):
    wide = flexq.LayerConfig(weight_bits=8)
    config = config_of(monkeypatch, tmp_path, layers={"*.experts.down_proj": wide})
    method = config.get_quant_method(FusedMoEOfATest(), "model.layers.0.mlp.experts")
    assert method.configs == (flexq.LayerConfig(), wide)
    config.check_all_placed()
    config = config_of(monkeypatch, tmp_path, layers={"*.experts.down_proj": None})
    with pytest.raises(ValueError, match="vLLM has both or none"):
        config.get_quant_method(FusedMoEOfATest(), "model.layers.0.mlp.experts")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.downproj", "*.nothing"])
def test_plans_that_name_what_is_not_there(monkeypatch, tmp_path, name):
    layers = {name: flexq.LayerConfig(act_bits=6), "*.up_proj": None, "model.layers.0.mlp.experts": None}
    config = config_of(monkeypatch, tmp_path, layers=layers)
    config.get_quant_method(linear(), "model.layers.0.mlp.down_proj")
    config.get_quant_method(FusedMoEOfATest(), "model.layers.0.mlp.experts")
    with pytest.raises(ValueError, match="matches no linear layer of the model"):
        config.check_all_placed()


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "*visual*", "*gate", "lm_head", "*lm_head",
     "model.layers.0.mlp.downproj"],
)  # fmt: skip
def test_what_plans_leave_as_it_is_may_be_missing(monkeypatch, tmp_path, name):
    """As in a plan that was recorded from a model, whose routers vLLM asks no method for."""
    config = config_of(monkeypatch, tmp_path, layers={name: None})
    config.get_quant_method(linear(), "model.layers.0.mlp.down_proj")
    config.check_all_placed()


def test_experts_by_the_names_of_transformers(monkeypatch, tmp_path):
    """vLLM calls the module around Mixtral's otherwise."""
    six, eight = flexq.LayerConfig(), flexq.LayerConfig(weight_bits=8)
    names = [f"model.layers.0.mlp.experts.{projection}" for projection in ("gate_up_proj", "down_proj")]
    config = config_of(monkeypatch, tmp_path, layers=dict(zip(names, (six, eight), strict=True)))
    method = config.get_quant_method(FusedMoEOfATest(), "model.layers.0.block_sparse_moe.experts")
    assert method.configs == (six, eight)
    config.check_all_placed()


def test_encoders_that_are_named(monkeypatch, tmp_path):
    name = "visual.blocks.0.attn.qkv"
    config = config_of(monkeypatch, tmp_path, layers={name: flexq.LayerConfig(act_bits=6)})
    assert isinstance(config.get_quant_method(linear(), name), plugin.FlexQLinearMethod)
    assert isinstance(config.get_quant_method(linear(), "visual.blocks.1.attn.qkv"), UnquantizedLinearMethod)
    config.check_all_placed()


def checkpoint_of(*names: str, **packed) -> plugin.FlexQVllmConfig:
    config = plugin.FlexQVllmConfig(flexq.Plan(layers=dict.fromkeys(names, flexq.LayerConfig())))
    config.packed_modules_mapping = packed
    return config


def test_keys_that_are_values_too():
    """Gemma 4's layers without values of their own."""
    parts = [f"model.layers.0.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    config = checkpoint_of(*parts[:2], qkv_proj=["q_proj", "k_proj", "v_proj"])
    assert isinstance(config.get_quant_method(linear(), "model.layers.0.self_attn.qkv_proj"), plugin.FlexQLinearMethod)
    config.check_all_placed()
    config.plan.layers[parts[2]] = None
    with pytest.raises(ValueError, match="none of them may be left unquantized while others are not"):
        config.get_quant_method(linear(), "model.layers.0.self_attn.qkv_proj")


def test_merged_layers_that_a_class_does_not_tell_of():
    config = checkpoint_of(*(f"model.layers.0.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")))
    assert isinstance(config.get_quant_method(linear(), "model.layers.0.mlp.gate_up_proj"), plugin.FlexQLinearMethod)
    with pytest.raises(ValueError, match=r"has quantized model.layers.0.mlp.down_proj, which vLLM's class"):
        config.check_before_loading(torch.nn.Module())


def test_heads_without_a_place_are_refused():
    config = checkpoint_of("lm_head")
    with pytest.raises(ValueError, match="has a quantized lm_head, for which vLLM's class of this model has no place"):
        config.check_before_loading(torch.nn.Module())
    model = torch.nn.Module()
    model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"lm_head": None})
    config.check_before_loading(model)


class Reversing(torch.nn.Module):
    """A class that turns the rows of queries round, as Llama 4's puts them in another order."""

    def permute_qk_weight_for_rotary(self, name: str, weight: torch.Tensor):
        return name, weight.flip(0) if name.endswith("q_proj.weight") else weight


def test_rows_are_in_the_order_of_a_weights():
    model, tensor = torch.nn.Module(), torch.arange(12).view(4, 3)
    assert order_of_rows(model) is None
    model.language_model = Reversing()
    in_order = order_of_rows(model)
    for kind in ("qweight", "scales"):
        assert torch.equal(in_order(f"language_model.layers.0.q_proj.{kind}", tensor), tensor.flip(0))
        assert torch.equal(in_order(f"language_model.layers.0.v_proj.{kind}", tensor), tensor)
        assert torch.equal(in_order(f"vision_model.layers.0.q_proj.{kind}", tensor), tensor)
    assert torch.equal(in_order("language_model.layers.0.q_proj.weight", tensor), tensor)  # the class's own work
