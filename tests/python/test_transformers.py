"""FlexQ through transformers' own functions: quantizing while loading, saving, device maps, the LM head."""

import flexq
import pytest
import torch
from architectures import ARCHITECTURES, answer, distance
from conftest import tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.arange(20).view(1, -1)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def quantized_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, flexq.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizes_while_loading(tiny_folder, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=dtype, quantization_config=flexq.FlexQConfig("w6a6")
    )
    reference = flexq.quantize_model(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype), "w6a6")
    assert torch.equal(logits(loaded), logits(reference))
    assert loaded.flexq_plan.layers == reference.flexq_plan.layers
    assert all(m.is_prepacked for m in loaded.modules() if isinstance(m, flexq.Linear))
    assert not any(p.device.type == "meta" for p in loaded.parameters())


def test_layers_with_biases(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=flexq.FlexQConfig())
    assert torch.equal(logits(loaded), logits(flexq.quantize_model(model.eval())))


def test_classes_that_initialize_their_childrens_weights(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_bigcode", vocab_size=64, n_embd=128, n_layer=2, n_head=2, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=flexq.FlexQConfig())
    expected = logits(flexq.quantize_model(model))
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    assert again.transformer.h[0].attn.c_proj.weight.shape == (128, 128)


def test_include_skip_and_device_map(tiny_folder):
    config = flexq.FlexQConfig("w6a8", include=["*.mlp.*"], skip=["*.1.mlp.down_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, device_map="cpu")
    assert len(quantized_layers(loaded)) == 5
    with pytest.raises(ValueError, match="matches no linear layer"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=flexq.FlexQConfig(skip=["nothing"]))


@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_save_pretrained_round_trip(tiny_folder, tmp_path, shards):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=flexq.FlexQConfig("w6a6"))
    loaded.save_pretrained(tmp_path / "saved", max_shard_size=shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(loaded))
    assert again.config.quantization_config.plan == loaded.flexq_plan
    assert torch.equal(logits(flexq.load_model(tmp_path / "saved")), logits(loaded))  # has no checksums
    again.save_pretrained(tmp_path / "again", max_shard_size=shards)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))


def test_dtype_of_a_quantized_checkpoint(tiny_llama, tmp_path):
    flexq.save_model(flexq.quantize_model(tiny_llama), tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device_map="cpu")
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert logits(loaded).dtype == torch.bfloat16


def test_a_weight_that_cannot_be_quantized_stops_the_load(tiny_llama, tmp_path):
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):  # transformers' own; its report names layer and cause
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=flexq.FlexQConfig())


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head(tmp_path, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path / "float")
    plan = flexq.Plan(layers={"lm_head": flexq.LayerConfig(act_bits=8)})
    embeddings = model.get_input_embeddings().weight.clone()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=flexq.FlexQConfig(plan))
    quantized = flexq.quantize_model(model, plan)
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", plan)
    flexq.save_model(quantized, tmp_path / "memory")

    assert isinstance(quantized.lm_head, flexq.Linear)
    assert torch.equal(quantized.get_input_embeddings().weight, embeddings)
    expected = logits(quantized)
    for other in (loaded, flexq.load_model(tmp_path / "disk"), flexq.load_model(tmp_path / "memory")):
        assert isinstance(other.lm_head, flexq.Linear)
        assert torch.equal(logits(other), expected)


def test_a_pattern_leaves_the_lm_head(tiny_llama):
    quantized = flexq.quantize_model(tiny_llama, flexq.Plan(layers={"*": flexq.LayerConfig(act_bits=6)}))
    assert "lm_head" not in quantized_layers(quantized)


def test_models_without_an_lm_head(tiny_folder):
    base = AutoModel.from_pretrained(tiny_folder, quantization_config=flexq.FlexQConfig())
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny_folder, quantization_config=flexq.FlexQConfig(skip=["score"]), num_labels=3
    )
    assert len(quantized_layers(base)) == len(quantized_layers(classifier)) == 14
    with torch.inference_mode():
        assert torch.isfinite(base(IDS).last_hidden_state).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss", "qwen3_moe", "llama4_text", "zamba2"])
def test_back_in_floating_point(kind, tmp_path):
    """`model.dequantize()`: the weights that the codes stand for, in the model's own classes and files."""
    architecture = next(a for a in ARCHITECTURES if a.kind == kind)
    model = architecture.model()
    names, classes = set(model.state_dict()), [type(m) for m in model.modules()]
    quantized = flexq.quantize_model(model)
    flexq.fuse_model(quantized)
    expected = answer(architecture, quantized)
    weight = next(m for m in quantized.modules() if type(m) is flexq.Linear).dequantize()
    assert quantized.dequantize() is model and not hasattr(model, "flexq_plan")
    assert set(model.state_dict()) == names and [type(m) for m in model.modules()] == classes
    assert any(p.shape == weight.shape and torch.equal(p, weight) for p in model.parameters()) or kind == "gpt2"
    assert distance(answer(architecture, model), expected) < (0.1 if kind in ("llama", "gpt2", "zamba2") else 0.3)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(architecture, again), answer(architecture, model))
    assert flexq.quantize_model(again, "w6a6").flexq_plan.defaults.act_bits == 6


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_embeddings_back_in_floating_point(kind, tmp_path):
    """Scaled ones too."""
    architecture = next(a for a in ARCHITECTURES if a.kind == kind)
    model = architecture.model()
    before = model.get_input_embeddings()
    flexq.quantize_model(model, flexq.Plan(embeddings=8))
    weight = model.get_input_embeddings().dequantize()
    expected = model.get_input_embeddings()(IDS)
    back = model.dequantize().get_input_embeddings()
    assert type(back) is type(before) and torch.equal(back.weight, weight) and torch.equal(back(IDS), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(architecture, again), answer(architecture, model))


def test_what_was_in_floating_point_stays_as_it_is(tmp_path):
    """Buffers of rotary embeddings are in fp32 whatever the model is in."""
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=flexq.FlexQConfig())
    model.save_pretrained(tmp_path / "saved")  # after which the configuration's dtype is a string
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert frequencies.dtype == torch.float32
    model.dequantize()
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dequantize(torch.float16)
    assert torch.equal(half.model.rotary_emb.inv_freq, frequencies)
    assert {p.dtype for p in half.parameters()} == {torch.float16} and torch.isfinite(logits(half)).all()


def test_classes_that_ask_their_configuration_for_a_dtype(tmp_path):
    """Apertus's activation, whose class cannot be made from what `save_pretrained` leaves."""
    settings = tiny_config().to_diff_dict() | {"hidden_act": "xielu"}
    settings.pop("model_type")
    config = AutoConfig.for_model("apertus", **settings)
    model = flexq.quantize_model(AutoModelForCausalLM.from_config(config).eval())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert isinstance(loaded.config.dtype, str)
    expected = flexq.load_model(tmp_path).model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(loaded.dequantize().model.layers[0].mlp.up_proj.weight, expected)


def test_layers_that_were_exchanged_are_not_saved_by_another_plan(tiny_llama, tmp_path):
    """config.json is written from the plan of the quantization."""
    up = torch.nn.Linear(*tiny_llama.model.layers[0].mlp.up_proj.weight.shape[::-1], bias=False)
    model = flexq.quantize_model(tiny_llama)
    model.model.layers[0].mlp.up_proj = flexq.Linear.from_float(up, flexq.LayerConfig(rotation="none"))
    with pytest.raises(ValueError, match=r"save it by flexq\.save_model"):
        model.save_pretrained(tmp_path / "one")
    flexq.save_model(model, tmp_path / "other")
    assert torch.equal(logits(flexq.load_model(tmp_path / "other")), logits(model))


def test_a_base_model_of_a_checkpoint_with_a_head(tmp_path):
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    flexq.quantize_model(model, flexq.Plan(layers={"lm_head": flexq.LayerConfig()})).save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert "lm_head" not in base.flexq_plan.layers
    base.save_pretrained(tmp_path / "base")
    with torch.inference_mode():
        expected, again = base(IDS), AutoModel.from_pretrained(tmp_path / "base")(IDS)
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state)


def test_layers_that_transformers_keeps_in_fp32(tmp_path):
    """T5's wo, by its name, in a model in fp16: not so its scales."""
    config = T5Config(vocab_size=97, d_model=96, d_ff=200, d_kv=24, num_layers=1, num_heads=4)
    model = flexq.quantize_model(T5ForConditionalGeneration(config).eval())
    ids = IDS.clamp(max=96)
    with torch.inference_mode():
        expected = model(ids, decoder_input_ids=ids).logits
        model.save_pretrained(tmp_path)
        half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
        logits = half(ids, decoder_input_ids=ids).logits.float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_a_new_head_of_a_float_checkpoint_begins_at_random(tmp_path):
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=flexq.FlexQConfig())
    assert type(model.score) is torch.nn.Linear and len(quantized_layers(model)) == 14
    with torch.inference_mode():
        assert torch.isfinite(model(IDS).logits).all()


def test_something_of_a_model_stays_in_floating_point():
    """transformers asks a parameter for its dtype."""
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = OlmoForCausalLM(OlmoConfig(vocab_size=97, tie_word_embeddings=True, pad_token_id=0, **sizes))
    with pytest.raises(ValueError, match="leave the embedding as it is"):
        flexq.quantize_model(model, flexq.Plan(embeddings=8))
    assert flexq.quantize_model(model).dtype == torch.float32


def test_a_config_as_a_dictionary(tiny_folder):
    """As transformers takes them for other methods; what it does not know is not ignored."""
    given = {"quant_method": "flexq", "plan": "w6a6", "skip": ["*.mlp.*"]}
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=given)
    plan = loaded.config.quantization_config.plan
    assert plan.defaults.act_bits == 6 and isinstance(loaded.model.layers[0].mlp.up_proj, torch.nn.Linear)
    given["plan"] = flexq.Plan.named("w6a6").to_dict()
    assert flexq.FlexQConfig.from_dict(given).plan == flexq.Plan.named("w6a6")
    written = flexq.FlexQConfig("w6a6", include=["*proj"], skip=["*.mlp.*"]).to_dict()
    read = flexq.FlexQConfig.from_dict(written)
    assert (read.include, read.skip, read.to_dict()) == (["*proj"], ["*.mlp.*"], written)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bits'"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=given | {"bits": 5})
    with pytest.raises(ValueError, match="quant_method must be 'flexq', got 'gptq'"):
        flexq.FlexQConfig(quant_method="gptq")
