"""Threads on one model: a forward pass shares nothing that another changes."""

import copy
import threading

import flexq
import pytest
import torch
from conftest import character_tokenizer, tiny_config
from transformers import LlamaForCausalLM


def in_threads(count: int, work) -> list[BaseException]:
    """work(index) in each of `count` threads at once; what they raised."""
    barrier, errors = threading.Barrier(count), []

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("kernels", (False, True))
def test_one_fused_model(tiny_llama, kernels):
    model = flexq.quantize_model(tiny_llama)
    flexq.fuse_model(model, kernels=kernels)
    inputs = [torch.randint(0, 128, (1, 3 + 5 * i)) for i in range(4)]
    with torch.inference_mode():
        expected = [model(ids).logits for ids in inputs]

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(60):
                assert torch.equal(model(inputs[index]).logits, expected[index])

    assert in_threads(4, work) == []


def test_the_first_forward_of_a_layer():
    linear = torch.nn.Linear(300, 200)
    x = torch.randn(4, 300)
    for _ in range(20):
        layer = flexq.Linear.from_float(linear)
        with torch.inference_mode():
            expected = layer(x)
        layer._unprepack()
        results = [None] * 4

        def work(index: int, layer=layer, results=results) -> None:
            with torch.inference_mode():
                results[index] = layer(x)

        assert in_threads(4, work) == []
        assert all(torch.equal(result, expected) for result in results)


def test_generate_from_several_threads():
    """The first to come fuses the model."""
    tokenizer = character_tokenizer()
    model = flexq.quantize_model(LlamaForCausalLM(tiny_config()).eval())
    texts = [None] * 3

    def work(index: int) -> None:
        texts[index] = flexq.generate(model, tokenizer, "abc" * (index + 1), max_new_tokens=4).text

    assert in_threads(3, work) == []
    assert texts == [flexq.generate(model, tokenizer, "abc" * (i + 1), max_new_tokens=4).text for i in range(3)]


def test_a_tensor_that_changes_between_calls(tiny_llama):
    """An input that a merged layer has seen is not mistaken for what it was."""
    model = flexq.quantize_model(tiny_llama)
    flexq.fuse_model(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 96)
    with torch.inference_mode():
        first = [part(x).clone() for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        x.mul_(2)
        second = [part(x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_changes_between_parts(tiny_llama, mode):
    model = flexq.quantize_model(tiny_llama)
    expected = model.model.layers[0].self_attn
    q, k = copy.deepcopy(expected.q_proj), copy.deepcopy(expected.k_proj)
    flexq.fuse_model(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 96)
    with mode():
        x = x.clone()  # a tensor of this mode
        attention.q_proj(x)
        x.mul_(2)
        assert torch.equal(attention.q_proj(x), q(x))
        if mode is torch.no_grad:  # PyTorch does not count writes to tensors of inference mode
            x.mul_(2)
        assert torch.equal(attention.k_proj(x), k(x))
