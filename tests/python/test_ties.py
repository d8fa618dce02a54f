"""Tied tensors that a quantized LM head parts with, and those that stay one."""

import flexq
import pytest
import torch
from architectures import architecture
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BlipConfig,
    BlipForConditionalGeneration,
)

IDS = torch.arange(3, 27).view(2, 12)
HEAD = flexq.Plan(layers={"lm_head": flexq.LayerConfig()})
BART = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 200, "decoder_ffn_dim": 200,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_ff": 200, "d_kv": 24, "num_layers": 1, "num_heads": 4}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bart", BART),
        ("marian", BART | {"pad_token_id": 0}),
        ("t5", T5),
        ("switch_transformers", T5 | {"num_layers": 2, "num_experts": 2}),  # which scales by what is tied
    ],
)
def test_heads_of_encoder_decoders(kind, settings, tmp_path):
    """Their embeddings stay one, in every way that a checkpoint is made."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=97, d_model=96, **settings)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "float")

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return model(IDS, decoder_input_ids=IDS).logits

    exact, quantized = logits(model), logits(flexq.quantize_model(model, HEAD))
    assert isinstance(model.get_output_embeddings(), flexq.Linear)
    assert (quantized - exact).norm() < 0.15 * exact.norm()
    model.save_pretrained(tmp_path / "transformers")
    flexq.save_model(model, tmp_path / "flexq")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", HEAD)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "transformers")), quantized)
    for folder in ("flexq", "disk"):
        assert torch.equal(logits(flexq.load_model(tmp_path / folder)), quantized)


def test_a_tied_bias_goes_with_its_head(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=97, **sizes)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    flexq.quantize_model(model, flexq.Plan(embeddings=8))
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_heads_that_are_tied_once_the_model_is_loaded(tmp_path):
    """BLIP's head is where no class of transformers says, and tied."""
    text = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 4,
            "projection_dim": 96}  # fmt: skip
    config = BlipConfig(
        projection_dim=96,
        text_config=text | {"vocab_size": 97, "encoder_hidden_size": 96, "bos_token_id": 1, "sep_token_id": 2},
        vision_config=text | {"image_size": 28, "patch_size": 14},
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    model = BlipForConditionalGeneration.from_pretrained(tmp_path, quantization_config=flexq.FlexQConfig())
    assert type(model.text_decoder.cls.predictions.decoder) is torch.nn.Linear
    assert any(isinstance(module, flexq.Linear) for module in model.text_decoder.modules())


def test_blocks_that_share_their_weights_beside_a_quantized_head(tmp_path):
    """Zamba 2: what ties its head ties its blocks too, and stays."""
    model = architecture("zamba2-CausalLM").model()
    model.save_pretrained(tmp_path / "float")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", HEAD)
    quantized = flexq.quantize_model(model, HEAD)
    flexq.save_model(quantized, tmp_path / "memory")
    with torch.inference_mode():
        expected = quantized(IDS).logits
        for folder in ("disk", "memory"):
            assert torch.equal(flexq.load_model(tmp_path / folder)(IDS).logits, expected)


def test_quantized_embeddings_of_a_tied_encoder_decoder(tmp_path):
    model = architecture("whisper-SpeechSeq2Seq").model()
    model.save_pretrained(tmp_path / "float")
    plan = flexq.Plan.uniform(embeddings=8)
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", plan)
    quantized, loaded = flexq.quantize_model(model, plan), flexq.load_model(tmp_path / "disk")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in quantized.state_dict().items())
