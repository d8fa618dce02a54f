"""examples/llama against transformers on the same checkpoints.

FLEXQ_LLAMA names the built program, and FLEXQ_SMOLLM2, if set, a FlexQ checkpoint of SmolLM2-135M.
"""

import os
import shutil
import subprocess

import flexq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

LLAMA = os.environ.get("FLEXQ_LLAMA")
SMOLLM2 = os.environ.get("FLEXQ_SMOLLM2")
pytestmark = pytest.mark.skipif(LLAMA is None, reason="FLEXQ_LLAMA names no program")

SIZES = {
    "vocab_size": 256, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 640,
}  # fmt: skip
LLAMA_CONFIG = LlamaConfig(
    **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
)
QWEN2_CONFIG = Qwen2Config(**SIZES, tie_word_embeddings=False, head_dim=40)
MIXED = {
    "format": "flexq-plan", "version": 1,
    "layers": {"*.q_proj": {"act_bits": 6, "scheme": "channel"}, "*.0.mlp.up_proj": {"rotation": "none"},
               "*.v_proj": {"weight_bits": 4}, "*.1.mlp.down_proj": {"weight_bits": 8},
               "lm_head": {"act_bits": 8}},
}  # fmt: skip


def run(folder, *arguments):
    return subprocess.run([LLAMA, str(folder), *map(str, arguments)], capture_output=True, text=True)


def generate(folder, prompt, count, *arguments):
    result = run(folder, "--tokens", ",".join(map(str, prompt)), "--new", count, *arguments)
    assert result.returncode == 0, result.stderr
    return [int(token) for token in result.stdout.split(",")]


@pytest.fixture(
    scope="module",
    params=["llama, one file", "llama, mixed plan", "qwen2 with biases, many files", "llama, embeddings"],
)
def checkpoint(request, tmp_path_factory):
    """A random model, quantized and saved."""
    torch.manual_seed(0)
    config = QWEN2_CONFIG if request.param.startswith("qwen2") else LLAMA_CONFIG
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn_like(parameter), alpha=0.02)
    plan = {"mixed plan": MIXED, "embeddings": flexq.Plan(embeddings=8)}.get(request.param.rpartition(", ")[2], "w6a8")
    flexq.quantize_model(model, plan)
    folder = tmp_path_factory.mktemp("llama") / "model"
    flexq.save_model(model, folder, shard_bytes=100_000 if "many" in request.param else 2**30)
    return folder


@pytest.mark.parametrize(("length", "threads"), [(1, 1), (37, 2), (600, 2)])
def test_each_token_is_the_likeliest(checkpoint, length, threads):
    """By transformers' logits, up to what the rounding of activations can change."""
    model = flexq.load_model(checkpoint, dtype=torch.float32)
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    new = generate(checkpoint, prompt, 24, "--threads", threads)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + new])).logits[0, length - 1 : -1]
    short = logits.max(-1).values - logits[torch.arange(len(new)), new]
    assert short.max() < 0.02 * logits.std()


def test_generation_stops(checkpoint):
    tokens = generate(checkpoint, [5, 6, 7], 24)
    assert generate(checkpoint, [5, 6, 7], 24, "--stop", tokens[4]) == tokens[: tokens.index(tokens[4]) + 1]


def damage(folder, change):
    """A copy of a checkpoint in which `change` has altered the bytes of its (first) file."""
    copy = folder.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = sorted(copy.glob("*.safetensors"))[0]
    file.write_bytes(change(file.read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b[:-1000], "does not fit"),
        (lambda b: b[:4], "cut off"),
        (lambda b: b"\xff" * 8 + b[8:], "cut off"),
        (lambda b: b[:8] + b[8:60].replace(b":", b";") + b[60:], "JSON"),
        (lambda b: b.replace(b'"U8"', b'"U9"'), "U9"),
    ],
)
def test_damaged_files_are_refused(checkpoint, change, says):
    result = run(damage(checkpoint, change), "--tokens", "1")
    assert result.returncode == 1 and says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "1,256"], "0 to 255"),
        (["--tokens", "1,x"], "number"),
        (["--tokens", "1", "--new", "0"], "1 or more"),
        (["--tokens", "1", "--new", "2000"], "positions"),
        (["--tokens", "1", "--fast"], "--fast"),
        ([], "usage"),
    ],
)
def test_wrong_arguments_are_refused(checkpoint, arguments, says):
    result = run(checkpoint, *arguments)
    assert result.returncode == 1 and says in result.stderr


@pytest.mark.skipif(SMOLLM2 is None, reason="FLEXQ_SMOLLM2 names no checkpoint")
@pytest.mark.parametrize(
    "prompt", ["The lighthouse keeper", "Water boils at", "def fibonacci(n):", "In the year 1850,"]
)
def test_smollm2_says_what_transformers_says(prompt):
    """The same tokens, or the same up to a place where two are equally likely: logits have a spread of six, and move by
    some hundredths with the order of float sums, as a rounded activation takes the next code."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = flexq.load_model(SMOLLM2, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = generate(SMOLLM2, ids[0].tolist(), 48)
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=None)[
            0, ids.shape[1] :
        ].tolist()
        at = next((i for i in range(48) if new[i] != expected[i]), None)
        if at is not None:
            logits = model(torch.cat([ids, torch.tensor([expected[:at]], dtype=torch.long)], 1)).logits[0, -1]
            assert set(logits.topk(2).indices.tolist()) == {new[at], expected[at]}
            assert abs(logits[new[at]] - logits[expected[at]]) < 0.1
