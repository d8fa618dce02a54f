"""Shared fixtures: small random models, so that no test needs a download."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(settings | overrides))


def character_tokenizer(bos: bool = False):
    """A tokenizer of single characters, of 98 ids; with `bos`, one that puts <s> before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(c): i for i, c in enumerate(range(32, 127))} | {"<unk>": 95, "\n": 96, "<s>": 97}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 97)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture
def tiny_folder(tiny_llama, tmp_path):
    """The same model saved by transformers, in several shards."""
    folder = tmp_path / "float"
    tiny_llama.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def models():
    """A small Llama with sharper logits, so that differences show, and the same model quantized."""
    from flexq.quantize.layers import shared_copy
    from flexq.quantize.model import quantize_model
    from test_calibrate import model_of

    reference = model_of("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(20)
    return reference, quantize_model(shared_copy(reference))


@pytest.fixture(scope="module")
def ranking(models):
    """The measured sensitivity of its layers."""
    from flexq.planning import sensitivity
    from test_calibrate import windows

    reference, model = models
    return sensitivity.measure(model, reference, windows())
