"""Small random models of many kinds: quantized while loading, saved, loaded, fused, calibrated, from disk to disk."""

import warnings

import architectures
import flexq
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, answer, distance
from flexq.experts import ExpertWeights
from flexq.quantize.report import coverage

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the weights")
WINDOWS = [torch.arange(3, 35).view(1, 32), torch.arange(100, 132).view(1, 32)]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_every_way_gives_the_same_model(architecture, tmp_path):
    model = architecture.model()
    expected = answer(architecture, model)
    model.save_pretrained(tmp_path / "float")
    auto = getattr(transformers, architecture.auto)
    config = flexq.FlexQConfig("w6a8", skip=list(architecture.skip))
    loaded = auto.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    quantized = answer(architecture, loaded)
    assert any(isinstance(m, flexq.Linear) for m in loaded.modules())
    assert 1e-4 < distance(quantized, expected) < 0.3
    in_place = flexq.quantize_model(model, "w6a8", skip=config.skip)
    assert torch.equal(answer(architecture, in_place), quantized)

    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", "w6a8", skip=config.skip)
    loaded.save_pretrained(tmp_path / "saved")
    in_place.save_pretrained(tmp_path / "in_place")
    flexq.save_model(loaded, tmp_path / "model")
    for folder in ("disk", "saved", "in_place", "model"):
        again = flexq.load_model(tmp_path / folder)
        assert type(again) is type(model)
        assert torch.equal(answer(architecture, again), quantized), folder
        assert flexq.checkpoint.verify.verify(tmp_path / folder).keys
        assert torch.equal(answer(architecture, auto.from_pretrained(tmp_path / folder).eval()), quantized)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_fused_and_taken_apart(architecture, tmp_path):
    model = flexq.quantize_model(architecture.model(), "w6a8", skip=architecture.skip)
    quantized, names = answer(architecture, model), set(model.state_dict())
    flexq.fuse_model(model, kernels=True)
    assert distance(answer(architecture, model), quantized) < 0.05
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "fused")
    assert torch.equal(answer(architecture, flexq.load_model(tmp_path / "fused")), quantized)
    if architecture.auto == "AutoModelForCausalLM":
        ids = torch.arange(3, 27).view(2, 12)
        assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 15)
    flexq.unfuse_model(model)
    assert torch.equal(answer(architecture, model), quantized)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_calibrated(architecture):
    model = architecture.model()
    expected = answer(architecture, model)
    if architecture.family == "audio":
        with pytest.raises(ValueError, match="takes input_features, not text"):
            flexq.calibrate_model(model, WINDOWS)
        assert torch.equal(answer(architecture, model), expected)
        return
    flexq.calibrate_model(model, WINDOWS, skip=architecture.skip)
    assert model.flexq_plan.produced_by["rounding"] == "compensated"
    assert distance(answer(architecture, model), expected) < 0.3


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_says_which_share_is_quantized(architecture):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = flexq.quantize_model(architecture.model(), skip=architecture.skip)
    found = coverage(model)
    counted = sum(p.numel() for p in model.parameters() if p.dim() > 0)
    counted += sum(m.num_weights for m in model.modules() if isinstance(m, (flexq.Linear, ExpertWeights)))
    assert found.total == pytest.approx(counted, rel=1e-3)
    warned = any("of the weights outside embeddings" in str(w.message) for w in caught)
    assert warned == (found.share_inside < 0.8)


def test_the_docs_table_is_what_the_models_do():
    assert architectures.PAGE.read_text() == architectures.page()
