"""Perplexity, KL divergence and the recipes they compare."""

import copy
import math

import flexq
import pytest
import torch
from flexq.evaluate.compare import plot, with_recipe
from flexq.evaluate.perplexity import Evaluation, evaluate
from flexq.evaluate.text import default_text, spread, windows_of
from flexq.quantize.layers import linear_bytes
from torch import nn


class Characters:
    """A tokenizer of single characters below 128."""

    def __call__(self, text, **_):
        ids = torch.tensor([[min(ord(c), 127) for c in text]])
        return type("Encoding", (), {"input_ids": ids})()


WINDOWS = windows_of(Characters(), "the quick brown fox jumps over the lazy dog " * 6, 32, 4)


def test_windows():
    assert len(WINDOWS) == 4 and all(w.shape == (1, 32) for w in WINDOWS)
    assert torch.equal(
        torch.cat(windows_of(Characters(), "abcdefgh", 3), 1), torch.tensor([[97, 98, 99, 100, 101, 102]])
    )
    with pytest.raises(ValueError, match="the text has 5 tokens, fewer than one window of 6"):
        windows_of(Characters(), "abcde", 6)
    with pytest.raises(ValueError, match="window length must be 2 or more, got 1"):
        windows_of(Characters(), "abcde", 1)
    with pytest.raises(ValueError, match="number of windows must be 1 or more, got 0"):
        windows_of(Characters(), "abcde", 2, 0)


def test_default_text_ships():
    assert default_text().lstrip().startswith("= Homarus gammarus =") and len(default_text()) > 50_000


def test_figures_against_their_definitions(tiny_llama):
    other = with_recipe(tiny_llama, "paper")
    reference, result = evaluate({"paper": other}, WINDOWS, tiny_llama)
    nll, kl, count = 0.0, 0.0, 0
    with torch.inference_mode():
        for window in WINDOWS:
            q, p = (m(window).logits[0, :-1].double().log_softmax(-1) for m in (tiny_llama, other))
            nll -= p.gather(1, window[0, 1:, None]).sum().item()
            kl += (q.exp() * (q - p)).sum().item()
            count += 31
    assert result.tokens == reference.tokens == count
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result.kl == pytest.approx(kl / count, rel=1e-3, abs=1e-7)
    assert result.perplexity_change == pytest.approx(result.perplexity / reference.perplexity - 1)


def test_a_model_has_no_divergence_from_itself(tiny_llama):
    _, same = evaluate({"same": with_recipe(tiny_llama, "w6a8")}, WINDOWS, with_recipe(tiny_llama, "w6a8"))
    assert same.kl == pytest.approx(0.0, abs=1e-8) and same.perplexity_change == 0.0


def test_recipes_share_what_they_do_not_change(tiny_llama):
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    quantized = with_recipe(tiny_llama, "w8a8")
    assert quantized.model.embed_tokens.weight is tiny_llama.model.embed_tokens.weight
    assert type(tiny_llama.model.layers[0].mlp.up_proj) is nn.Linear
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.named_parameters())
    stored, resident = linear_bytes(with_recipe(tiny_llama, "w6a8"))
    assert 0 < stored < linear_bytes(quantized)[0] * 1.7 and resident >= stored * 0.9
    with pytest.raises(ValueError, match="unknown recipe 'w2a2'; built in are"):
        with_recipe(tiny_llama, "w2a2")


def test_plot(tmp_path):
    results = [
        Evaluation("unquantized", 10.0, None, 5, 100, 100),
        Evaluation("a", 10.2, 0.02, 5, 60, 60, 0.02),
        Evaluation("b", 11.0, 0.2, 5, 50, 50, 0.1),
    ]
    plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a plot compares models with a reference"):
        plot(results[:1], tmp_path / "q.png")


class Emulated(nn.Module):
    """A quantized layer in float64, from its codes and scales (docs/how-it-works/numerics.md)."""

    def __init__(self, layer: flexq.Linear):
        super().__init__()
        self.config = layer.config
        planes, self.scales = layer.canonical()
        self.codes = flexq.unpack_codes(planes)

    def forward(self, x):
        import reference

        codes, scales = reference.quantize_activation(
            x.reshape(-1, x.shape[-1]), self.config.act_bits, self.config.scheme, self.config.rotation
        )
        y, _ = reference.product(codes.flatten(1), scales, self.codes, self.scales)
        return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("recipe", ("w6a8", "w6a6", "paper"))
def test_logits_match_a_whole_model_in_float64(tiny_llama, recipe):
    """The packed model against the same model with every layer emulated and all else in float64."""
    packed = with_recipe(tiny_llama, recipe)
    emulated = copy.deepcopy(packed).double()
    for name, module in list(emulated.named_modules()):
        if isinstance(module, flexq.Linear):
            parent, _, child = name.rpartition(".")
            setattr(emulated.get_submodule(parent), child, Emulated(module))
    with torch.inference_mode():
        got, expected = packed(WINDOWS[0]).logits.double(), emulated(WINDOWS[0]).logits
    # A code next to a rounding boundary may fall on its other side in fp32. Quantizing moves the logits by 1 to 10%.
    assert (got - expected).norm() / expected.norm() < 2e-3


def test_windows_spread_over_a_text():
    windows = [torch.tensor([[i]]) for i in range(10)]
    assert [w.item() for w in spread(windows, 4)] == [0, 2, 5, 7]
    assert spread(windows, 20) == windows
