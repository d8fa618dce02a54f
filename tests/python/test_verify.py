"""Damaged, edited and foreign checkpoints: refused in one line, or loaded to the same logits."""

import json
import random
import shutil

import flexq
import pytest
import torch
from flexq.checkpoint.source import INDEX
from flexq.checkpoint.verify import verify
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

IDS = torch.arange(20).view(1, -1)
LAYER = "model.layers.0.mlp.up_proj"


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with biases and an LM head of its own, in two files; and its logits."""
    from conftest import tiny_config

    torch.manual_seed(0)
    config = tiny_config(attention_bias=True, tie_word_embeddings=False)
    model = flexq.quantize_model(LlamaForCausalLM(config).eval())
    folder = flexq.save_model(model, tmp_path_factory.mktemp("original") / "model", shard_bytes=160_000)
    assert (folder / INDEX).is_file()
    return folder, logits(model)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "model")


def file_of(folder, tensor: str):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def rewrite(folder, tensor: str, change, keep_metadata: bool = False) -> None:
    """Change a dictionary of the tensors in the file that holds `tensor`, without checksums unless asked."""
    file = file_of(folder, tensor)
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata if keep_metadata else {"format": "pt"})


def edit_json(folder, name: str, change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def both_refuse(folder, message: str) -> None:
    """`load_model`, plain `from_pretrained` and `verify` refuse with one line."""
    for load in (flexq.load_model, verify, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_says_what_was_checked(original, tmp_path):
    found = verify(original[0])
    assert found.with_checksum == found.tensors > 30 and found.plan_is_bound and found.keys
    assert "checksums of all" in str(found)
    flexq.load_model(original[0]).save_pretrained(tmp_path / "saved")
    found = verify(tmp_path / "saved")
    assert found.with_checksum == 0 and found.plan_is_bound
    assert "checksums of 0 of" in str(found) and "have none" in str(found)


@pytest.mark.parametrize(
    "tensor",
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"],
)
def test_missing_tensors(folder, tensor):
    rewrite(folder, tensor, lambda tensors: tensors.pop(tensor))
    edit_json(folder, INDEX, lambda index: index["weight_map"].pop(tensor))
    both_refuse(folder, f"tensor {tensor} is missing")


@pytest.mark.parametrize("tensor", [f"{LAYER}.qweight", f"{LAYER}.scales"])
def test_missing_tensors_of_a_quantized_layer(folder, tensor):
    rewrite(folder, tensor, lambda tensors: tensors.pop(tensor))
    edit_json(folder, INDEX, lambda index: index["weight_map"].pop(tensor))
    both_refuse(folder, f"tensor {tensor} is missing")


def test_a_missing_shard(folder):
    name = file_of(folder, f"{LAYER}.qweight").name
    (folder / name).unlink()
    for load in (flexq.load_model, verify):
        with pytest.raises(flexq.CheckpointError, match=f"shard {name} is missing"):
            load(folder)


def test_unexpected_and_mismatched_tensors(folder):
    def add(tensors):
        tensors["model.extra.weight"] = torch.zeros(3)

    rewrite(folder, "model.norm.weight", add)
    where = file_of(folder, "model.norm.weight").name
    edit_json(folder, INDEX, lambda index: index["weight_map"].update({"model.extra.weight": where}))
    both_refuse(folder, r"tensor model\.extra\.weight has no place in the model")

    def replace(tensors):
        tensors.pop("model.extra.weight")
        tensors["model.norm.weight"] = torch.ones(95)

    rewrite(folder, "model.norm.weight", replace)
    edit_json(folder, INDEX, lambda index: index["weight_map"].pop("model.extra.weight"))
    both_refuse(folder, r"tensor model\.norm\.weight is \[95\], the model's \[96\]")


def test_index_and_files_are_compared_both_ways(folder):
    edit_json(folder, INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(flexq.CheckpointError, match=r"model\.norm\.weight does not belong there.*does not know it"):
        verify(folder)
    name = file_of(folder, f"{LAYER}.qweight").name
    edit_json(folder, INDEX, lambda index: index["weight_map"].update(ghost=name))
    with pytest.raises(flexq.CheckpointError, match="tensor ghost is missing"):
        verify(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", 7])
def test_a_shards_name_is_a_bare_name(folder, name):
    edit_json(folder, INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(flexq.ModelError, match=r"bare name of a file|is not a weight index"):
        flexq.load_model(folder)


def test_a_stray_shard(folder):
    shutil.copy(file_of(folder, "model.norm.weight"), folder / "model-00009-of-00009.safetensors")
    with pytest.raises(flexq.CheckpointError, match="is in the folder, but"):
        verify(folder)


@pytest.mark.parametrize("change", [{"rotation": "none"}, {"act_bits": 6}, {"scheme": "channel"}])
def test_the_plan_is_bound_to_the_tensors(folder, change):
    def edit(config):
        config["quantization_config"]["plan"]["layers"][LAYER].update(change)

    edit_json(folder, "config.json", edit)
    both_refuse(folder, "the plan in config.json is not the one that the tensors were quantized by")


@pytest.mark.parametrize("plan", ["w6a8", "/etc/passwd", None, [], {"format": "flexq-plan", "version": 1.0}])
def test_a_checkpoints_plan_is_an_object(folder, plan):
    edit_json(folder, "config.json", lambda config: config["quantization_config"].update(plan=plan))
    both_refuse(folder, "plan")


def test_every_qweight_has_a_layer(folder):
    edit_json(folder, "config.json", lambda config: config["quantization_config"]["plan"]["layers"].pop(LAYER))
    for file in folder.glob("*.safetensors"):  # as one without hashes
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(flexq.CheckpointError, match=rf"{LAYER}\.qweight is of no layer that the plan quantizes"):
        flexq.load_model(folder)
    with pytest.raises(ValueError, match="tensor"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_are_looked_at(folder, value):
    def spoil(tensors):
        tensors[f"{LAYER}.scales"][3, 0] = value

    rewrite(folder, f"{LAYER}.scales", spoil)
    both_refuse(folder, "scales must be finite and not negative|scales must be finite")


def test_shapes_are_compared_before_anything_is_allocated(folder):
    edit_json(folder, "config.json", lambda config: config.update(vocab_size=1 << 24))
    both_refuse(folder, r"tensor .* is \[128, 96\], the model's \[16777216, 96\]")


def test_quantized_by_others(folder, tiny_folder, tmp_path):
    for method in ("fp8", "gptq"):
        edit_json(tiny_folder, "config.json", lambda c, m=method: c.update(quantization_config={"quant_method": m}))
        for call in (
            lambda: flexq.quantize_checkpoint(tiny_folder, tmp_path / "out"),
            lambda: flexq.load_model(tiny_folder),
        ):
            with pytest.raises(flexq.ModelError, match=f"by {method}"):
                call()
    edit_json(tiny_folder, "config.json", lambda c: c.update(quantization_config=None))
    flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")


def test_a_cached_hub_id_is_its_folder(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(folder.iterdir()):
        shutil.copy(file, repository / "blobs" / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    from flexq.checkpoint.source import find_model, is_quantized

    source = find_model("owner/name")
    assert source.folder == snapshot and is_quantized(source)
    assert torch.isfinite(logits(flexq.load_model("owner/name"))).all()
    blob = (snapshot / "config.json").resolve()
    config = json.loads(blob.read_text())
    config["quantization_config"]["plan"]["layers"][LAYER]["act_bits"] = 6
    blob.write_text(json.dumps(config))
    with pytest.raises(flexq.CheckpointError, match="the plan in config"):
        flexq.load_model("owner/name")


# ---- Any damage ------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    data, where = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[where : where + rng.randrange(1, 40)]
    elif kind == 2:
        data[where:where] = rng.randbytes(rng.randrange(1, 40))
    else:
        data = data[:where]
    return bytes(data)


_VALUES = (None, True, False, 0, -1, 1.5, 8.0, 1e308, 2**40, "", "x", "w6a8", [], {}, [[]], {"a": 1})


def mutate_json(rng: random.Random, data):
    """One value anywhere in it is another, gone, or deep."""
    places = []

    def walk(value):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(data)
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)
    return data


def check(folder, expected: torch.Tensor) -> str:
    """The same logits, or one line."""
    try:
        model = flexq.load_model(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message, message
        return "refused"
    # What a config says of dropout, generation and the like may change; what the model computes may not, unless it is
    # what the config says: a number of heads, an epsilon.
    assert logits(model).shape[-1] == expected.shape[-1]
    return "same" if torch.equal(logits(model), expected) else "other"


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes(original, tmp_path, seed):
    rng = random.Random(seed)
    names = sorted(p.name for p in original[0].iterdir() if p.suffix in (".safetensors", ".json"))
    outcomes = []
    for _ in range(12):
        folder = shutil.copytree(original[0], tmp_path / "model")
        name = rng.choice([n for n in names if n.endswith("safetensors")] if rng.random() < 0.7 else names)
        (folder / name).write_bytes(mutate_bytes(rng, (folder / name).read_bytes()))
        outcomes.append(check(folder, original[1]) if not name.startswith("config") else check_any(folder))
        shutil.rmtree(folder)
    assert "other" not in outcomes


def check_any(folder) -> str:
    try:
        flexq.load_model(folder)
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    return "same"


@pytest.mark.parametrize("seed", range(6))
def test_damaged_json(original, tmp_path, seed):
    rng = random.Random(1000 + seed)
    for _ in range(12):
        folder = shutil.copytree(original[0], tmp_path / "model")
        name = rng.choice(("config.json", INDEX))
        data = mutate_json(rng, json.loads((folder / name).read_text()))
        (folder / name).write_text(json.dumps(data))
        check_any(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{" * 100_000, "nested too deeply|is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|is not JSON"),
        (b"[]", "must hold a JSON object, got a list"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"", "is not JSON"),
        (b"{}", "configuration|is not a weight index"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(folder, content, message, name):
    (folder / name).write_bytes(content)
    with pytest.raises(flexq.ModelError, match=message) as caught:
        flexq.load_model(folder)
    assert "\n" not in str(caught.value)


def test_bin_files_alone(tiny_folder, tmp_path):
    for file in tiny_folder.glob("*.safetensors*"):
        file.unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(flexq.ModelError, match=r"pickled \.bin files.*save it again"):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")


def test_a_hundred_thousand_layers_in_a_plan(folder):
    import time

    def add(config):
        layers = config["quantization_config"]["plan"]["layers"]
        layers.update({f"model.layers.{i}.mlp.up_proj": {} for i in range(2, 100_000)})

    edit_json(folder, "config.json", add)
    begin = time.perf_counter()
    with pytest.raises(flexq.CheckpointError):
        flexq.load_model(folder)
    assert time.perf_counter() - begin < 20
