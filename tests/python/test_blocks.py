"""Running a model block by block: each block with its own arguments."""

import pytest
import torch
from architectures import ARCHITECTURES
from flexq.planning import sensitivity
from flexq.quantize.blocks import stacks_of, starting_at, trace
from flexq.quantize.calibrate import calibrate_model
from flexq.quantize.inputs import run
from flexq.quantize.model import quantize_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

WINDOW = torch.arange(3, 51).view(1, 48)
# Masks and rotary embeddings that differ from block to block.
LOCAL = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "t5": {},
    "bart": {},
    "bert": {},
    "falcon": {},
    "gpt2": {},
    "openai-gpt": {},  # whose blocks return lists
}


def model_of(kind: str):
    from dataclasses import replace

    architecture = next(a for a in ARCHITECTURES if a.kind == kind)
    return replace(architecture, overrides=architecture.overrides | LOCAL[kind]).model()


@pytest.mark.parametrize("kind", LOCAL)
def test_blocks_give_what_the_model_gives(kind):
    model = model_of(kind)
    with torch.no_grad():
        expected = run(model, WINDOW)
        stacks = stacks_of(model)
        assert len(stacks) == (2 if kind in ("t5", "bart") else 1)
        for stack in stacks:
            traced = trace(model, stack.blocks, WINDOW)
            hidden = traced.calls[0].hidden
            for block, call in zip(stack.blocks, traced.calls, strict=True):
                torch.testing.assert_close(call.hidden, hidden)
                hidden = call.run(block)
            torch.testing.assert_close(hidden, traced.last)
            for index in range(len(stack.blocks) + 1):
                state = traced.calls[index].hidden if index < len(stack.blocks) else traced.last
                with starting_at(stack.blocks, index, state, traced.rests):
                    torch.testing.assert_close(run(model, WINDOW), expected)


def test_blocks_with_two_streams_are_calibrated_as_a_whole():
    """Reformer's, which name what they return."""
    config = AutoConfig.for_model(
        "reformer", vocab_size=256, hidden_size=64, num_attention_heads=4, attention_head_size=16,
        feed_forward_size=128, attn_layers=["local", "local"], local_attn_chunk_length=8, axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[32, 32], max_position_embeddings=64, is_decoder=True, hidden_dropout_prob=0.0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not stacks_of(model)
    with torch.no_grad():
        expected = run(model, WINDOW)
        calibrated = run(calibrate_model(model, [WINDOW]), WINDOW)
    assert model.flexq_plan.produced_by["rounding"] == "compensated"
    assert (calibrated - expected).norm() < 0.05 * expected.norm()


def test_a_model_that_takes_no_four_tokens_is_calibrated():
    """Funnel, which halves the text from block to block."""
    config = AutoConfig.for_model(
        "funnel", vocab_size=256, block_sizes=[1, 1], num_decoder_layers=1, d_model=64, n_head=4, d_head=16, d_inner=128
    )
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        expected = run(model, WINDOW)
        calibrated = run(calibrate_model(model, [WINDOW]), WINDOW)
    assert (calibrated - expected).norm() < 0.1 * expected.norm()


def shared_keys():
    """Gemma 3n: the last two of four layers take keys and values of earlier ones."""
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=256, vocab_size_per_layer_input=256, hidden_size=64, intermediate_size=[128] * 4,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=16,
        altup_num_inputs=4, laurel_rank=8, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, sliding_window=8, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def test_calibration_where_blocks_share_keys():
    model = shared_keys()
    with torch.no_grad():
        expected = run(model, WINDOW)
        nearest = run(quantize_model(shared_keys()), WINDOW)
        calibrated = run(calibrate_model(model, [WINDOW]), WINDOW)
    assert (calibrated - expected).norm() < 0.7 * (nearest - expected).norm()


@pytest.mark.parametrize("kind", ("gemma3_text", "bart", "gemma3n"))
def test_sensitivity_of_models_with_local_layers(kind):
    model = shared_keys() if kind == "gemma3n" else model_of(kind)
    quantized = quantize_model(shared_keys() if kind == "gemma3n" else model_of(kind))
    with torch.no_grad():
        ranking = sensitivity.measure(quantized, model, [WINDOW])
        for layer in ranking[:3]:
            with sensitivity.act_bits(list(sensitivity.quantized_layers(quantized).values()), 8):
                divergence = sensitivity.Divergence(model, [WINDOW])
                base = divergence.mean(quantized)
                with sensitivity.act_bits([quantized.get_submodule(layer.name)], 6):
                    assert divergence.mean(quantized) - base == pytest.approx(layer.kl, rel=1e-3, abs=1e-6)
