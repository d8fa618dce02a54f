"""Sensitivity of layers to 6-bit activations, and plans made from it."""

import copy

import pytest
import torch
from flexq.linear import Linear
from flexq.planning import sensitivity
from flexq.quantize.model import quantize_model
from test_calibrate import logits, model_of, windows


def test_every_layer_is_measured_as_if_it_were_run_whole(models, ranking):
    reference, model = models
    layers = sensitivity.quantized_layers(model)
    assert {r.name for r in ranking} == set(layers)
    densities = [r.density for r in ranking]
    assert densities == sorted(densities, reverse=True)
    divergence = sensitivity.Divergence(reference, windows())
    base = divergence(model)
    for r in (ranking[0], ranking[-1]):
        with sensitivity.act_bits([layers[r.name]], 6):
            added = torch.tensor(divergence(model)) - torch.tensor(base)
        assert r.kl == pytest.approx(added.mean().item(), rel=1e-3, abs=1e-6)
        assert r.parameters == layers[r.name].in_features * layers[r.name].out_features
        assert r.spread >= 0


def test_measuring_leaves_the_model_as_it_was(models, ranking):
    _, model = models
    before = logits(model)
    sensitivity.measure(model, models[0], windows(1))
    assert all(m.config.act_bits == 8 for m in model.modules() if isinstance(m, Linear))
    assert torch.equal(logits(model), before)


def test_file_and_plot(ranking, tmp_path):
    sensitivity.FILE.save(ranking, tmp_path / "s.json", model="m")
    assert sensitivity.FILE.load(tmp_path / "s.json") == ranking
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of this version's sensitivity to activation bits"):
        sensitivity.FILE.load(tmp_path / "other.json")
    sensitivity.plot(ranking, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    share, left = zip(*sensitivity.curve(ranking), strict=True)
    assert share[0] == 0 and share[-1] == pytest.approx(1) and left[-1] == pytest.approx(0, abs=1e-9)


def test_needs_a_quantized_model_and_text(models):
    with pytest.raises(ValueError, match="no quantized layer"):
        sensitivity.measure(models[0], models[0], windows())
    with pytest.raises(ValueError, match="at least one window"):
        sensitivity.measure(models[1], models[0], [])


def test_outputs_that_are_not_finite_are_refused(models):
    reference, model = models
    broken = copy.deepcopy(reference)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    for rank in (sensitivity.measure, sensitivity.estimate):
        with pytest.raises(ValueError, match="outputs on this text are not finite"):
            rank(model, broken, windows(1))


def test_estimate_agrees_with_the_measurement(models, ranking):
    reference, model = models
    estimated = sensitivity.estimate(model, reference, windows())
    assert {r.name for r in estimated} == {r.name for r in ranking}
    assert all(r.kl >= 0 for r in estimated)
    assert all(p.requires_grad for p in reference.parameters())  # left as it was
    assert sensitivity.rank_agreement(ranking, ranking) == pytest.approx(1.0)
    total = sum(r.kl for r in estimated)
    assert 0.2 * sum(max(r.kl, 0) for r in ranking) < total < 5 * sum(max(r.kl, 0) for r in ranking)


def test_estimate_of_a_layers_whole_error():
    model, reference = quantize_model(model_of("llama")), model_of("llama")
    worth = sensitivity.estimate(model, reference, windows(1), of="quantization")
    assert all(layer.kl > 0 for layer in worth)
    with pytest.raises(ValueError, match="of must be"):
        sensitivity.estimate(model, reference, windows(1), of="a4")
    with pytest.raises(ValueError, match="at least one window"):
        sensitivity.estimate(model, reference, [])


def test_perplexity(models):
    reference, _ = models
    expected = torch.stack([reference(w, labels=w).loss for w in windows()]).mean().exp().item()
    assert sensitivity.perplexity(reference, windows()) == pytest.approx(expected, rel=1e-4)
