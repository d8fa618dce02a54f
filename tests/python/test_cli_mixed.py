"""`flexq quantize` and `flexq sensitivity` with weight bits chosen layer by layer."""

import json

import pytest
from architectures import architecture
from conftest import character_tokenizer
from flexq.planning import widths
from test_cli import model, run, text  # noqa: F401


def produced_by(out) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]["plan"]["produced_by"]


def options_of(text):  # noqa: F811
    return ["--calibrate", text, "--window-length", "32", "--calibration-windows", "4", "--json"]


def test_recipe_best(model, text, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    code, _, errors = run("quantize", model, "-o", out, *options_of(text))
    assert code == 0 and "equalized (alpha 0.25): the inputs of 14 layers" in errors, errors
    found = produced_by(out)
    assert found["recipe"] == "best" and found["equalized"] == {"alpha": 0.25, "norms": 4, "rows": 4}
    code, printed, errors = run("info", out, "--layers", "--json")
    assert code == 0 and json.loads(printed)["layers"]["W8A8, scheme channel, rotation hadamard128"], errors


def test_bits_and_size(model, text, tmp_path):  # noqa: F811
    code, printed, errors = run("quantize", model, "-o", tmp_path / "a", *options_of(text), "--bits", "4.5")
    found = produced_by(tmp_path / "a")
    assert code == 0 and 4.0 <= found["mean_weight_bits"] <= 4.5 and found["measured_kl"] > 0, errors
    assert found["recipe"] == "best" and "bits in the mean" in errors and "measured on" in errors
    size = (sum(json.loads(printed)["bytes_by_part"].values()) + 3000) / 1e9
    code, printed, errors = run("quantize", model, "-o", tmp_path / "b", *options_of(text), "--size", size)
    assert code == 0 and sum(json.loads(printed)["bytes_by_part"].values()) <= 1e9 * size, errors
    assert produced_by(tmp_path / "b")["mean_weight_bits"] >= produced_by(tmp_path / "a")["mean_weight_bits"]


def test_bits_of_time(model, text, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    arguments = [*options_of(text), "--bits", "5.5", "--budget-of", "time", "--cost-device", "cpu"]
    code, _, errors = run("quantize", model, "-o", out, *arguments, "--cost-tokens", "2")
    found = produced_by(out)
    assert code == 0 and "us for 2 tokens on CPU, where 6 bits everywhere take" in errors, errors
    assert (
        found["budget_of"] == "time" and found["microseconds"] > 0 and (found["tokens"], found["device"]) == (2, "CPU")
    )


def test_bits_of_an_encoder(text, tmp_path):  # noqa: F811
    source, out = tmp_path / "bert", tmp_path / "out"
    architecture("bert-base").model().save_pretrained(source)
    character_tokenizer().save_pretrained(source)
    code, _, errors = run("quantize", source, "-o", out, *options_of(text), "--bits", "5")
    found = produced_by(out)
    assert code == 0 and 4.5 < found["mean_weight_bits"] <= 5.0 and 0 < found["measured_kl"] < 0.1, errors


def test_sensitivity_of_weights(model, text, tmp_path):  # noqa: F811
    out, plot = tmp_path / "w.json", tmp_path / "w.png"
    arguments = ["--weights", "--text", text, "--window-length", "32", "--windows", "2", "-o", out, "--plot", plot]
    code, printed, errors = run("sensitivity", model, *arguments)
    assert code == 0 and "KL at 5 bits" in printed and "6 in the mean" in printed, errors
    assert len(widths.FILE.load(out)) == 14 and plot.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "--bits looks at a text: give one with --calibrate"),
        (["--calibrate", "TEXT", "--weights"], "without one there is nothing to choose"),
        (["--calibrate", "TEXT", "--bits", "5", "--weight-bits", "6"], "leave it out where they are to be chosen"),
        (["--calibrate", "TEXT", "--bits", "5", "--size", "1"], "not allowed with"),
        (["--calibrate", "TEXT", "--bits", "3.5"], "must be a number from 4 to 8, got 3.5"),
        (["--calibrate", "TEXT", "--size", "1", "--budget-of", "time"], "is for --budget, --bits and --weights"),
    ],
)
def test_what_does_not_go_together(model, text, tmp_path, arguments, message):  # noqa: F811
    arguments = [text if a == "TEXT" else a for a in arguments]
    code, _, errors = run("quantize", model, "-o", tmp_path / "out", *arguments)
    assert code == 2 and message in errors


def test_embeddings(model, text, tmp_path):  # noqa: F811
    """Of a model whose LM head is tied to them."""
    out = tmp_path / "out"
    code, printed, errors = run("quantize", model, "-o", out, "--embeddings", "8", "--json")
    sizes = json.loads(printed)["bytes_by_part"]
    assert code == 0 and sizes["embeddings"] == 128 * (128 + 2) and sizes["head"] == 0, errors
    code, printed, errors = run("info", out, "--json")
    layers = json.loads(printed)["layers"]
    assert code == 0 and layers["embedding, 8 bits"] == layers["W8A8, scheme channel, rotation hadamard128"] == 1, (
        errors
    )
    evaluation = ["--text", text, "--window-length", "32", "--windows", "2", "--json"]
    code, printed, errors = run("eval", out, *evaluation)
    assert code == 0 and 0 < json.loads(printed)["results"][-1]["kl"] < 0.1, errors
    calibration = [*options_of(text), "--embeddings", "8"]
    for folder, options in (("memory", ()), ("files", ("--low-memory",))):
        code, _, errors = run("quantize", model, "-o", tmp_path / folder, *calibration, *options)
        assert code == 0 and produced_by(tmp_path / folder)["recipe"] == "best", errors
    files = [tmp_path / folder / "model.safetensors" for folder in ("memory", "files")]
    assert files[0].read_bytes() == files[1].read_bytes()
    size = 0.9e-9 * json.loads(run("info", tmp_path / "memory", "--json")[1])["bytes"]
    code, printed, errors = run("quantize", model, "-o", tmp_path / "small", *calibration, "--size", size)
    assert code == 0 and sum(json.loads(printed)["bytes_by_part"].values()) <= 1e9 * size, errors


def test_embeddings_without_their_head(model, text, tmp_path):  # noqa: F811
    calibration = [*options_of(text), "--embeddings", "8", "--head-bits", "float"]
    code, _, errors = run("quantize", model, "-o", tmp_path / "out", *calibration)
    assert code == 1 and "model.embed_tokens and lm_head share a weight" in errors and not (tmp_path / "out").exists()
