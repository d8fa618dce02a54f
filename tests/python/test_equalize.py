"""Equalization: what takes the factors is found in every architecture, and the model stays what it was."""

import pytest
import torch
from architectures import architecture
from flexq.quantize.equalize import equalize_model
from flexq.quantize.inputs import run
from flexq.quantize.layers import shared_copy
from test_fuse import logits, random_model

WINDOW = [torch.arange(100).view(1, -1)]


@pytest.mark.parametrize("kind", ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"))
def test_models_stay_what_they_are(kind):
    """Norms that multiply by their weight or by 1 + it, biases, heads that share keys and values."""
    model = random_model(kind)
    before = logits(model)
    equal = shared_copy(model)
    done = equalize_model(equal, WINDOW, 0.5)
    assert done.norms[:2] == [
        [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
        ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
    ]
    assert done.rows[:2] == [["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.down_proj"]]
    assert len(done.norms) == len(done.rows) == 4 and done.count == 14
    torch.testing.assert_close(logits(equal), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)  # its weights were replaced in the copy alone


def test_merged_layers_take_what_norms_give():
    model = random_model("phi3")
    before = logits(model)
    done = equalize_model(model, WINDOW)
    assert len(done.norms) == 4 and done.rows == []  # v and up are parts of other layers
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_encoders_equalize_what_attention_gives():
    """A value layer and the one that reads it in modules of their own; norms after residuals can take nothing."""
    text = WINDOW[0][:, :40]
    model = architecture("bert-base").model()
    before = run(model, text).detach()
    done = equalize_model(model, [text], 0.5)
    assert done.norms == [] and done.rows == [[f"encoder.layer.{i}.attention.output.dense"] for i in (0, 1)]
    with torch.no_grad():
        torch.testing.assert_close(run(model, text), before, rtol=1e-4, atol=1e-5)


def test_channels_become_alike():
    """Inputs and columns of the weights together spread less, the inputs the less the larger alpha is."""
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[::7] *= 30
    spreads = []
    for alpha in (0.0, 0.5, 1.0):
        equal = shared_copy(model)
        equalize_model(equal, WINDOW, alpha)
        seen = []
        handle = equal.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0]))  # noqa: B023
        logits(equal)
        handle.remove()
        spreads.append(seen[0].flatten(0, -2).square().mean(0).log().std().item())
    assert spreads[2] < 0.5 < spreads[1] < spreads[0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_other_types_round_nothing(dtype):
    """Factors are powers of two: every weight is another only in its exponent."""
    model = random_model("llama", dtype)
    equal = shared_copy(model)
    equalize_model(equal, WINDOW, 0.5)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        ratio = equal.get_submodule(name).weight.double() / model.get_submodule(name).weight.double()
        assert torch.equal(ratio.log2(), ratio.log2().round())


@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_norms_that_are_stored_in_another_type(kind):
    model = random_model(kind)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.bfloat16().float()
    before = logits(model)
    done = equalize_model(model, WINDOW, 0.5, carrier=torch.bfloat16)
    assert len(done.norms) == 4
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.testing.assert_close(parameter, parameter.bfloat16().float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_experts_and_routers_keep_their_norm():
    """What a norm gives is read by more than linear layers there."""
    model = random_model("mixtral", num_local_experts=4)
    before = logits(model)
    done = equalize_model(model, WINDOW)
    assert [names[0].rpartition(".")[2] for names in done.norms] == ["q_proj", "q_proj"]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_refusals():
    model = random_model("llama")
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        equalize_model(model, WINDOW, 2)
    with pytest.raises(ValueError, match="at least one window"):
        equalize_model(model, [])
