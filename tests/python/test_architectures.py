"""Small random models of many architectures: quantized while loading, saved, loaded, fused and taken apart again."""

import flexq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

KINDS = (
    "bloom", "cohere", "falcon_h1", "gemma", "glm4", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "lfm2",
    "mamba", "mixtral", "mpt", "nemotron", "olmo2", "opt", "persimmon", "phi", "qwen2_moe", "recurrent_gemma",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
OVERRIDES = {"gptj": {"rotary_dim": 16}, "recurrent_gemma": {"num_hidden_layers": 3}}
SKIP = {"mamba": ["*.dt_proj"]}  # its code reads that weight itself
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What some classes call the same, and experts, which are many by default.
OTHER_NAMES = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_layers": 2, "head_dim": 32, "num_experts": 4,
               "num_local_experts": 4}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)


def random_model(kind: str):
    config = AutoConfig.for_model(kind, **(SHAPE | OVERRIDES.get(kind, {})))
    for name, value in OTHER_NAMES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_saved_loaded_fused(kind, tmp_path):
    model = random_model(kind)
    expected = logits(model)
    model.save_pretrained(tmp_path / "float")
    config = flexq.FlexQConfig("w6a8", skip=SKIP.get(kind, []))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    quantized = logits(loaded)
    assert any(isinstance(m, flexq.Linear) for m in loaded.modules())
    assert 1e-4 < distance(quantized, expected) < 0.3
    assert torch.equal(logits(flexq.quantize_model(model, "w6a8", skip=config.skip)), quantized)
    loaded.save_pretrained(tmp_path / "saved")
    again = flexq.load_model(tmp_path / "saved")
    assert torch.equal(logits(again), quantized)
    flexq.fuse_model(again, kernels=True)
    assert distance(logits(again), quantized) < 0.05
    assert again.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 15)
    flexq.unfuse_model(again)
    assert torch.equal(logits(again), quantized)
