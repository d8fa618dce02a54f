"""The command line, run as a user runs it."""

import getpass
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import character_tokenizer, tiny_config
from flexq.bench import decode as bench_decode
from flexq.bench import linear as bench
from flexq.cli.main import main
from transformers import LlamaForCausalLM


@pytest.fixture
def model(tiny_folder):
    character_tokenizer().save_pretrained(tiny_folder)
    return tiny_folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return str(path)


def run(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "flexq", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_quantize_eval_generate_info(model, text, tmp_path):
    out, plot = tmp_path / "out", tmp_path / "plot.png"
    evaluation = ["--text", text, "--window-length", "32", "--windows", "3"]
    code, stdout, stderr = run(
        "quantize", model, "-o", out, "--compare", *evaluation, "--generate", "the", "--max-new-tokens", 4, "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["layers"] == 14 and result["peak_memory_bytes"] > 0
    assert [r["kl"] is None for r in result["comparison"]] == [True, False, False, False, False]
    assert result["generation"]["new_tokens"] == 4

    code, stdout, stderr = run("eval", out, "--reference", model, *evaluation, "--plot", plot)
    assert code == 0, stderr
    assert "perplexity" in stdout and "unquantized" in stdout and plot.stat().st_size > 1000

    code, stdout, stderr = run("generate", out, "the quick", "--max-new-tokens", 5, "--temperature", "0.8", "--seed", 1)
    assert code == 0 and "the quick" in stdout and "tokens/s" in stdout, stderr

    code, stdout, stderr = run("info", out, "--layers")
    assert code == 0 and "W6A8, scheme group, rotation hadamard128" in stdout and "checksums" in stdout, stderr


def test_eval_of_recipes(model, text, capsys):
    arguments = ["eval", str(model), "--recipes", "w8a8", "w6a8", "--text", text, "--window-length", "32", "--json"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["name"].partition(",")[0] for r in results] == ["unquantized", "W8A8", "W6A8"]
    sizes = [r["memory_bytes"] for r in results]
    assert sizes[0] > sizes[1] > 0 and all(r["perplexity"] > 1 for r in results)


def test_eval_knows_its_reference(model, text, tmp_path, monkeypatch, capsys):
    """A relative path that was recorded is another model in another folder, or none."""
    evaluation = ["--text", text, "--window-length", "32", "--windows", "2", "--device", "cpu"]
    monkeypatch.chdir(model.parent)
    assert main(["quantize", model.name, "-o", "out", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["eval", "out", *evaluation]) == 0
    assert f"reference {model.name}" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    out = str(model.parent / "out")
    assert main(["eval", out, *evaluation]) == 0
    assert "is not here: no KL divergence; give --reference" in capsys.readouterr().out
    shutil.copytree(model, model.name)
    config = json.loads(Path(model.name, "config.json").read_text())
    Path(model.name, "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_theta": 5, "rope_type": "default"}})
    )
    assert main(["eval", out, *evaluation]) == 0
    assert "is another model here (rope_parameters.rope_theta is 5, not" in capsys.readouterr().out
    assert main(["eval", out, "--recipes", "w8a8", *evaluation]) == 2
    assert main(["sensitivity", out, "--text", text, "--window-length", "32"]) == 2
    assert capsys.readouterr().err.count("give --reference") == 2
    monkeypatch.chdir(model.parent)
    shutil.rmtree(elsewhere / model.name)
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_config())
    other.save_pretrained(elsewhere / model.name)
    character_tokenizer().save_pretrained(elsewhere / model.name)
    monkeypatch.chdir(elsewhere)
    assert main(["eval", out, *evaluation]) == 0
    assert "is another model here (tensor model.embed_tokens.weight has other values)" in capsys.readouterr().out
    shutil.rmtree(model.name)
    shutil.copytree(out, model.name)  # of the name that it was made from
    assert main(["eval", model.name, *evaluation]) == 0
    assert "is not here, but a checkpoint of that name: no KL divergence" in capsys.readouterr().out
    assert main(["eval", out, "--reference", model.name, *evaluation]) == 2
    assert main(["sensitivity", out, "--reference", model.name, "--text", text, "--window-length", "32"]) == 2
    assert capsys.readouterr().err.count("was quantized by FlexQ") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "no/such/model/here"], 1, "is not a folder, a .gguf file, a hub id"),
        (["quantize", "MODEL", "--plan", "w4a4"], 1, "neither a file nor one of"),
        (["quantize", "MODEL", "--plan", "w6a6", "--act-bits", "8"], 2, "--act-bits and --plan exclude each other"),
        (["quantize", "MODEL", "--act-bits", "7"], 2, "invalid choice: 7"),
        (["eval", "MODEL", "--window-length", "100000"], 1, "fewer than one window of 100000"),
        (["eval", "MODEL", "--recipes", "w5a5", "--window-length", "64"], 1, "unknown recipe 'w5a5'"),
        (["generate", "MODEL", "hi", "--chat"], 1, "no chat template"),
        (["generate", "MODEL", "hi", "--max-new-tokens", "0"], 2, "must be a whole number, 1 or more, got 0"),
        (["quantize", "MODEL", "--threads", "99999"], 2, "must be a whole number from 1 to 1024, got 99999"),
        (
            ["quantize", "MODEL", "--shard-size", "2GB"],
            2,
            "must be a number above 0 and below 1e12, without a unit, got 2GB",
        ),
        (
            ["eval", "MODEL", "--choices", "x", "--text", "y"],
            2,
            "--text is of perplexity; leave it out beside --choices",
        ),
        (["bench", "linear", "--shape", "12"], 2, "a shape is NxK"),
        (["bench", "decode", "--device", "cpu", "--shape", "gpt-5"], 1, "unknown shape 'gpt-5'"),
        (["bench", "decode", "--device", "cpu", "--side-by-side", "--memory-limit", "9"], 1, "one contender at a time"),
        (["bogus"], 2, "invalid choice: 'bogus'"),
    ],
)
def test_errors_have_exit_codes(model, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    try:
        got = main([str(model) if a == "MODEL" else a for a in arguments])
    except SystemExit as error:
        got = error.code
    assert got == code and message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_bench_linear(tmp_path, capsys):
    arguments = ["bench", "linear", "--shape", "64x256", "--tokens", "1", "3", "--plot", str(tmp_path / "b.png")]
    assert main([*arguments, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert {p["m"] for p in points} == {1, 3} and any(p["kernel"].startswith("torch") for p in points)
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_bench_linear_interrupted(monkeypatch, capsys):
    time_all, calls = bench.cpu_seconds, iter(range(3))

    def time_some(kernels):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return time_all(kernels)

    monkeypatch.setattr(bench, "cpu_seconds", time_some)
    arguments = ["bench", "linear", "--shape", "64x256", "--tokens", "1", "3", "5", "--no-peers", "--quiet"]
    assert main(arguments) == 130
    rows = [line for line in capsys.readouterr().out.splitlines() if "64" in line]
    assert len(rows) == 2  # what had been measured


@pytest.mark.parametrize("side_by_side", (False, True))
def test_bench_decode(monkeypatch, capsys, side_by_side):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(bench_decode.SHAPES, "tiny", shape)
    arguments = ["bench", "decode", "--device", "cpu", "--shape", "tiny", "--batches", "1", "2", "--contexts", "16"]
    arguments += ["--prefills", "32", "--json", "--quiet", *(["--side-by-side"] if side_by_side else [])]
    assert main(arguments) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    what = [(1, 16, False), (2, 16, False), (1, 32, True)]
    expected = [(name, *rest) for name in bench_decode.CPU_CONTENDERS for rest in what]
    assert [(p["contender"], p["batch"], p["context"], p["prefill"]) for p in points] == expected
    assert all(p["milliseconds"] > 0 and p["weight_bytes"] > 0 for p in points)


def test_bench_decode_of_experts(monkeypatch):
    shape = bench_decode.SHAPES["qwen3-30b-a3b"] | {
        "hidden_size": 128, "moe_intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64,
    }  # fmt: skip
    monkeypatch.setitem(bench_decode.SHAPES, "tiny", shape)
    points = bench_decode.bench_decode("tiny", None, (1, 64), (16,), (), device="cpu")
    assert [(p.contender, p.batch) for p in points] == [
        ("flexq W6A8", 1),
        ("flexq W6A8", 64),
        ("bf16", 1),
        ("bf16", 64),
    ]
    few, many = (p.floor_milliseconds for p in points if p.contender == "bf16")
    assert few < 0.7 * many  # of 8 experts two are read
    assert points[0].weight_bytes < 0.6 * points[2].weight_bytes
    with pytest.raises(ValueError, match="tiny has experts, for which fp8 has no kernels"):
        bench_decode.bench_decode("tiny", ["bf16", "fp8"], device="cpu")


def test_bench_decode_of_a_contender_that_fails(monkeypatch, capfd):
    monkeypatch.setitem(bench_decode.SHAPES, "odd", {"hidden_size": 128, "num_attention_heads": 0})
    with pytest.raises(RuntimeError, match="the process of flexq W6A8 failed"):
        bench_decode.bench_decode("odd", ["flexq W6A8"], device="cpu", side_by_side=True)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_interrupt_leaves_nothing(model, tmp_path):
    out = tmp_path / "out"
    code = (
        "import signal, sys, time, flexq.ops as ops, flexq.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell ignore it
        "quantize = ops.quantize_weight\n"
        "def slow(*a): print('working', flush=True); time.sleep(60); return quantize(*a)\n"
        "ops.quantize_weight = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "quantize", str(model), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    time.sleep(0.2)
    assert list(tmp_path.glob(".out.*"))  # written aside
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr
    assert not out.exists() and not list(tmp_path.glob(".out.*"))


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flexq ")
    assert main([]) == 2


def test_calibrated_with_a_budget(model, text, tmp_path):
    out, plot, ranking = tmp_path / "out", tmp_path / "s.png", tmp_path / "s.json"
    options = ["--calibrate", text, "--window-length", "32", "--calibration-windows", "4"]
    # The text is one window of the length that layers are measured on.
    budget = ["--budget", "0.3", "--a6", "anywhere"]
    code, printed, errors = run("quantize", model, "-o", out, *options, *budget, "--json", "--quiet")
    assert code == 0, errors
    assert json.loads(printed)["layers"] == 14 and "of the parameters" in errors
    code, printed, errors = run("info", out, "--layers", "--json")
    info = json.loads(printed)
    assert code == 0 and info["produced_by"]["recipe"] == "calibrated" and info["produced_by"]["budget"] == 0.3
    assert len(info["layers"]) == 2  # A6 and A8
    arguments = ["--text", text, "--window-length", "32", "--windows", "2", "-o", ranking, "--plot", plot]
    code, printed, errors = run("sensitivity", out, *arguments)
    assert code == 0 and "KL added by A6" in printed and plot.stat().st_size > 0, errors
    assert len(json.loads(ranking.read_text())["layers"]) == 14
    estimated = ["--estimate", "--agreement", ranking, "--text", text, "--window-length", "32", "--windows", "2"]
    code, printed, errors = run("sensitivity", out, *estimated, "--json", "--quiet")
    assert code == 0 and -1 <= json.loads(printed)["rank_agreement"] <= 1, errors


def test_perplexity_target_estimated_and_resumed(model, text, tmp_path):
    options = ["--calibrate", text, "--window-length", "32", "--resume", tmp_path / "parts", "--estimate", "--quiet"]
    options += ["--target-ppl", "1000", "--a6", "anywhere"]
    code, _, errors = run("quantize", model, "-o", tmp_path / "out", *options, "--json")
    assert code == 0, errors
    assert len(list((tmp_path / "parts").glob("block-*.safetensors"))) == 2
    produced = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["plan"]["produced_by"]
    assert produced["target_ppl"] == 1000 and produced["measured_ppl"] <= 1000
    assert produced["ranked_by"].endswith("estimated")


def test_several_prompts_and_choices(model, tmp_path):
    code, printed, errors = run("generate", model, "the quick", "a", "--max-new-tokens", 4, "--no-fuse", "--json")
    assert code == 0 and len(json.loads(printed)["text"]) == 2, errors
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}\n')
    code, printed, errors = run("eval", model, "--choices", questions, "--json", "--quiet")
    assert code == 0 and json.loads(printed)["choices"][0]["questions"] == 1, errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    (
        (["--budget", "0.3"], 2, "give one with --calibrate"),
        (["--plan", "best"], 2, "give one with --calibrate"),
        (["--calibrate", "TEXT", "--window-length", "5000"], 1, "fewer than one window"),
        (["--calibrate", "TEXT", "--window-length", "32", "--target-ppl", "1.001"], 1, "cannot be met"),
        (["--calibrate", "TEXT", "--window-length", "32", "--budget", "2"], 2, "must be a share from 0 to 1"),
        (["--calibrate", "TEXT", "--window-length", "32", "--size", "1e-7"], 1, "with all that is stored, got 1e-07"),
        (
            ["--calibrate", "TEXT", "--resume", "MODEL"],
            1,
            "holds other files; a calibration goes on in a folder of its own",
        ),
        (["--calibrate", "TEXT", "--resume", "TEXT"], 1, "is a file; a calibration goes on in a folder of its own"),
        (["--calibrate", "TEXT", "--resume", ""], 2, "--resume names a folder, got ''"),
        (["--calibrate", "TEXT", "--budget", "0", "--act-bits", "8"], 2, "--act-bits gives every layer the same"),
    ),
)
def test_calibration_that_cannot_be_done(model, text, tmp_path, arguments, code, message):
    arguments = [{"TEXT": text, "MODEL": str(model)}.get(a, a) for a in arguments]
    out = tmp_path / "out"
    got, _, errors = run("quantize", model, "-o", out, *arguments, "--quiet")
    assert got == code and message in errors
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    (
        ("quantize MODEL -o OUT --resume parts", 2, "--resume is of calibration"),
        ("quantize MODEL -o OUT --calibration-windows 3", 2, "--calibration-windows is of calibration"),
        ("quantize MODEL -o OUT --window-length 7", 2, "--window-length is for --compare and --calibrate"),
        ("quantize MODEL -o OUT --calibrate TEXT --text TEXT", 2, "--text is for --compare"),
        ("quantize MODEL -o OUT --calibrate TEXT --plot a.png", 2, "--plot is for --compare"),
        ("quantize MODEL -o OUT --device tpu", 1, "device must be cpu, cuda, cuda:N or auto, got 'tpu'"),
        ("quantize MODEL -o= --act-bits 8", 2, "--output names a new folder"),
        ("quantize NO-TOKENIZER -o OUT --generate hi", 1, "cannot read the tokenizer"),
        ("eval MODEL --plot curve.txt", 2, "got curve.txt"),
        ("eval MODEL --plot OUT/curve.png", 2, "must be a file in a folder that is there"),
        ("eval MODEL --plot curve.png", 2, "give one, and no --choices"),
        ("sensitivity MODEL -o OUT/ranking.json", 2, "must be a file in a folder that is there"),
        ("generate MODEL hi --top-p 3", 2, "must be a share from 0 to 1"),
    ),
)
def test_what_cannot_be_done_is_said_first(model, text, tmp_path, capsys, arguments, code, message):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=lambda _, names: [n for n in names if "token" in n])
    out = tmp_path / "out"
    places = {"MODEL": str(model), "NO-TOKENIZER": str(bare), "TEXT": text}
    arguments = [places.get(a, a).replace("OUT", str(out)) for a in arguments.split()]
    try:
        got = main([*arguments, "--quiet"])
    except SystemExit as stopped:  # argparse's own
        got = stopped.code
    assert (got, message in (errors := capsys.readouterr().err)) == (code, True), errors
    assert not out.exists()


def test_bug_report(monkeypatch, capsys, tmp_path):
    """What an issue needs, and nothing that says who or where somebody is."""
    monkeypatch.setenv("FLEXQ_COSTS", str(tmp_path / "secret.costs"))
    assert main(["info", "--bug-report", "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    for key in ("flexq", "torch", "transformers", "python", "system", "processor", "cpu", "GPUs"):
        assert report[key], key
    assert "FLEXQ_COSTS" in report["set in the environment"]
    for private in (str(tmp_path), platform.node(), getpass.getuser(), str(Path.home())):
        assert len(private) < 4 or private not in text, private


def test_bug_report_is_about_the_installation(capsys, model):
    assert main(["info", "--bug-report", str(model)]) == 2
    assert "leave out MODEL" in capsys.readouterr().err
