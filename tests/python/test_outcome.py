"""What a model makes of a text as a distribution, and what is planned by it for models that predict no tokens."""

import pytest
import torch
from architectures import architecture
from flexq.plan import Plan
from flexq.planning import sensitivity
from flexq.planning.mixed import Mixed
from flexq.planning.sensitivity import Divergence
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from flexq.quantize.outcome import HiddenStates, NextTokens, outcome
from test_calibrate import model_of, windows

WIDTHS = (4, 5, 6, 8)


@pytest.fixture(scope="module")
def encoder():
    return architecture("bert-base").model()


def test_kind_of_outcome(encoder):
    text = windows(1)[0]
    tokens, states = outcome(model_of("llama"), text), outcome(encoder, text)
    assert isinstance(tokens, NextTokens) and len(tokens) == 39
    torch.testing.assert_close(tokens.values.exp().sum(-1), torch.ones(39))
    assert isinstance(states, HiddenStates) and len(states) == 40
    assert torch.equal(states.values, encoder(text).last_hidden_state[0])


@pytest.mark.parametrize("kind", ("llama", "bert"))
def test_the_gradient_of_the_likelihood_gives_the_divergence(encoder, kind):
    """To second order, half the mean square of (gradient . error), over many draws, is the KL divergence."""
    torch.manual_seed(0)
    if kind == "llama":
        values = torch.randn(1, 20, requires_grad=True)
        error, of = 0.02 * torch.randn(1, 20), lambda x: NextTokens(x.log_softmax(-1))
    else:
        values = torch.randn(1, 20, requires_grad=True)
        error, of = 0.05 * torch.randn(1, 20), lambda x: HiddenStates(x)
    squares = []
    for seed in range(2000):
        (gradient,) = torch.autograd.grad(of(values).log_likelihood(seed), values)
        squares.append((gradient * error).sum().square().item())
    expected = of(values.detach()).divergence(of(values.detach() + error))
    assert 0.5 * sum(squares) / len(squares) == pytest.approx(expected, rel=0.15)


def test_divergence_of_states_is_the_loss_of_cosine():
    torch.manual_seed(0)
    states = torch.nn.functional.normalize(torch.randn(50, 64), dim=-1)
    near = torch.nn.functional.normalize(states + 0.01 * torch.randn(50, 64), dim=-1)
    cosine = (states * near).sum(-1).mean().item()
    assert HiddenStates(3 * states).divergence(HiddenStates(3 * near)) == pytest.approx(1 - cosine, rel=1e-3)


def test_widths_of_an_encoder(encoder):
    divergence = Divergence(encoder, windows())
    mixed = Mixed.of(encoder, windows(), Plan.uniform(scheme="channel"))
    for bits in WIDTHS:
        model = quantize_model(shared_copy(encoder), Plan.uniform(scheme="channel", weight_bits=bits))
        estimated = sum(layer.kl[bits] for layer in mixed.ranking)
        assert 0.4 < estimated / divergence.mean(model) < 2.5, bits
    plan = mixed.plan_at(mixed.at_bits(4.5))
    assert plan.produced_by["mean_weight_bits"] <= 4.5
    assert plan.layers["pooler.dense"].weight_bits == 6  # the hidden states do not depend on it
    assert mixed.fixed_bytes == 128 * (128 * 6 // 8 + 2)


def test_activations_of_an_encoder(encoder):
    model = quantize_model(shared_copy(encoder))
    measured = {layer.name: layer.kl for layer in sensitivity.measure(model, encoder, windows())}
    estimated = {layer.name: layer.kl for layer in sensitivity.estimate(model, encoder, windows())}
    assert 0.3 < sum(estimated.values()) / sum(measured.values()) < 3
