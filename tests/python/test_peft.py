"""LoRA adapters on quantized layers."""

import flexq
import pytest
import torch
from flexq.integrations.peft import for_flexq
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from test_fuse import IDS, random_model


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a float model, its folder and the float model's logits with it."""
    model = get_peft_model(random_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        return tmp_path, model(IDS).logits


def test_loads_an_adapter(adapter):
    folder, expected = adapter
    quantized = flexq.quantize_model(random_model("llama"))
    with torch.inference_mode():
        without = quantized(IDS).logits
        model = PeftModel.from_pretrained(quantized, folder, config=for_flexq(PeftConfig.from_pretrained(folder)))
        assert (model(IDS).logits - expected).norm() < 0.1 * expected.norm()
        assert (without - expected).norm() > 0.3 * expected.norm()
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, without)


def test_what_is_not_possible(adapter):
    folder, _ = adapter
    model = PeftModel.from_pretrained(
        flexq.quantize_model(random_model("llama")), folder, config=for_flexq(PeftConfig.from_pretrained(folder))
    )
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="type LORA"):
        for_flexq(IA3Config())
