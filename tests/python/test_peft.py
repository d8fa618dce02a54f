"""LoRA adapters on quantized layers."""

import copy

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


def test_gradients_are_those_of_the_dequantized_weight():
    torch.manual_seed(0)
    layer = flexq.Linear.from_float(torch.nn.Linear(300, 50))
    x = torch.randn(7, 300, requires_grad=True)
    reference = x.detach().clone().requires_grad_(True)
    gradient = torch.randn(7, 50)
    layer(x).backward(gradient)
    torch.nn.functional.linear(reference, layer.dequantize(), layer.bias).backward(gradient)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("fused", (False, True))
def test_training_an_adapter_reduces_the_loss(tiny_llama, fused):
    torch.manual_seed(0)
    reference = copy.deepcopy(tiny_llama)
    model = flexq.quantize_model(tiny_llama)
    if fused:
        flexq.fuse_model(model)  # without kernels: o_proj and down_proj are layers still
    targets = ["o_proj", "down_proj"] if fused else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
    ids = torch.randint(0, 128, (4, 24))
    losses, gradients = [], []
    for base, settings in ((model, for_flexq(config)), (reference, config)):
        torch.manual_seed(1)
        adapted = get_peft_model(base, settings).train()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        history = []
        for step in range(12):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            if step == 0:
                gradients.append({n: p.grad.clone() for n, p in trained.items() if "lora_B" in n})
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0] - 0.5
    assert abs(losses[0][-1] - losses[1][-1]) < 0.2
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient - other).norm() < 0.2 * other.norm(), name


def test_fused_kernels_refuse_to_train(tiny_llama):
    model = flexq.quantize_model(tiny_llama)
    flexq.fuse_model(model, kernels=True)
    embeddings = model.get_input_embeddings()(torch.arange(5).view(1, 5)).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeddings).logits  # a forward pass alone is fine
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits)
    with pytest.raises(RuntimeError, match="pass no gradients"):
        logits.sum().backward()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_change_the_weight_are_refused(start):
    with pytest.raises(ValueError, match="takes the adapter's part out of the weight"):
        for_flexq(LoraConfig(target_modules=["q_proj"], init_lora_weights=start))


def test_a_model_with_an_adapter_saves_it(tmp_path):
    """By transformers' own functions: the adapter alone."""
    model = flexq.quantize_model(random_model("llama"))
    model.add_adapter(for_flexq(LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
