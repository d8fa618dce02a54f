"""Texts as windows: BOS, spread, and what a model cannot take."""

import json

import flexq
import pytest
import torch
from conftest import character_tokenizer, tiny_config
from flexq.evaluate.perplexity import evaluate
from flexq.evaluate.text import Limits, prefix_of, windows_of
from flexq.evaluate.zero_shot import Question, log_likelihoods
from transformers import LlamaForCausalLM

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


def test_each_window_begins_with_bos_where_the_tokenizer_adds_it():
    with_bos, without = (windows_of(character_tokenizer(bos), TEXT, 33) for bos in (True, False))
    assert prefix_of(character_tokenizer(True)) == [97] and prefix_of(character_tokenizer()) == []
    assert all(w.shape == (1, 33) and w[0, 0] == 97 for w in with_bos)
    assert all((w[0, 1:] != 97).all() for w in with_bos)
    assert all((w != 97).all() for w in without)
    text = torch.cat([w[0, 1:] for w in with_bos])
    assert torch.equal(text, torch.cat([w[0] for w in without])[: len(text)])


def test_windows_are_spread_over_the_text():
    every = windows_of(character_tokenizer(), TEXT, 30)
    some = windows_of(character_tokenizer(), TEXT, 30, 3)
    assert [torch.equal(a, b) for a, b in zip(some, (every[0], every[6], every[12]), strict=True)] == [True] * 3


def test_what_a_model_cannot_take(tiny_llama):
    assert Limits.of(tiny_llama) == Limits(128, 128)
    tokenizer = character_tokenizer()
    assert windows_of(tokenizer, TEXT, model=tiny_llama)[0].shape == (1, 128)  # as many as it has positions
    with pytest.raises(ValueError, match="windows of 129 tokens are longer than the model's 128 positions"):
        windows_of(tokenizer, TEXT, 129, model=tiny_llama)
    small = LlamaForCausalLM(tiny_config(vocab_size=60))
    with pytest.raises(ValueError, match="and the model has 60 embeddings"):
        windows_of(tokenizer, TEXT, 32, model=small)
    for length in (1, 0, -5):
        with pytest.raises(ValueError, match="must be 2 or more"):
            windows_of(tokenizer, TEXT, length)


def test_logits_that_are_not_finite(tiny_llama):
    windows = windows_of(character_tokenizer(), TEXT, 32, 2)
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="broken gives logits that are not finite"):
        evaluate({"broken": tiny_llama}, windows)


def test_models_that_predict_no_tokens():
    from architectures import ARCHITECTURES, architecture

    windows = windows_of(character_tokenizer(), TEXT, 32, 2)
    encoder = architecture("bert-base").model()
    with pytest.raises(ValueError, match="BertModel gives no logits for each token"):
        evaluate({"encoder": encoder}, windows)
    bart = next(a for a in ARCHITECTURES if a.kind == "bart").model()
    assert evaluate({"bart": bart}, windows)[0].perplexity > 1


def test_zero_shot_begins_with_bos_too(tiny_llama):
    seen = []
    tiny_llama.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"][0, 0].item()), with_kwargs=True)
    log_likelihoods(tiny_llama, character_tokenizer(True), Question("2 + 2 =", ("3", "4"), 1))
    assert seen == [97, 97]


def test_eval_says_so(tiny_folder, tmp_path, capsys):
    from flexq.cli import main

    character_tokenizer(True).save_pretrained(tiny_folder)
    (tmp_path / "text").write_text(TEXT)
    flexq.quantize_checkpoint(tiny_folder, tmp_path / "q")
    arguments = ["eval", str(tmp_path / "q"), "--text", str(tmp_path / "text"), "--windows", "3", "--quiet"]
    assert main([*arguments, "--window-length", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["begins_with"] == [97] and result["windows"] == 3 and result["device"].startswith("CPU")
    assert result["results"][1]["kl"] >= 0
