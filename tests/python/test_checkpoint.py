"""Checkpoints: bit-exact round trips, damage named, nothing half-written."""

import json
import shutil

import flexq
import pytest
import torch
from flexq.checkpoint import source as checkpoint
from flexq.checkpoint.verify import verify_files
from flexq.checkpoint.write import ShardWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, MixtralConfig, MixtralForCausalLM

IDS = torch.arange(20).view(1, -1)


@pytest.fixture
def saved(tiny_llama, tmp_path):
    model = flexq.quantize_model(tiny_llama, "w6a6")
    return model, flexq.save_model(model, tmp_path / "saved")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_round_trip_is_bit_exact(saved):
    model, folder = saved
    loaded = flexq.load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.flexq_plan.layers == model.flexq_plan.layers
    assert all(m.is_prepacked for m in loaded.modules() if isinstance(m, flexq.Linear))
    again = flexq.save_model(loaded, folder.parent / "again")
    first, second = tensors_of(folder), tensors_of(again)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_transformers_loads_it(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_no_float_copy_is_stored(saved):
    names = set(tensors_of(saved[1]))
    assert "model.layers.0.mlp.up_proj.qweight" in names
    assert not any(n.endswith("proj.weight") for n in names)
    assert "lm_head.weight" not in names  # tied


def test_shards(tiny_llama, tmp_path):
    model = flexq.quantize_model(tiny_llama)
    folder = flexq.save_model(model, tmp_path / "shards", shard_bytes=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / checkpoint.INDEX).is_file()
    assert torch.equal(logits(flexq.load_model(folder)), logits(model))


@pytest.mark.parametrize("shard_bytes", (30_000, 1 << 30))
def test_disk_to_disk_equals_in_memory(tiny_llama, tiny_folder, tmp_path, shard_bytes):
    plan = flexq.quantize_checkpoint(tiny_folder, tmp_path / "out", "w6a8", shard_bytes=shard_bytes)
    assert sum(c is not None for c in plan.layers.values()) == 14
    model = flexq.quantize_model(tiny_llama, "w6a8")
    assert torch.equal(logits(flexq.load_model(tmp_path / "out")), logits(model))


def test_disk_to_disk_never_holds_the_model(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("flexq.checkpoint.convert.load_model", lambda *_: pytest.fail("the whole model was loaded"))
    flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")


def test_refusals_leave_nothing(tiny_folder, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="matches no linear layer"):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out", include=["x"])
    shard = sorted(tiny_folder.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(flexq.CheckpointError, match=shard.name):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(flexq.ModelError, match="is missing"):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def single(model, folder):
    """The model in one file, and what edits that."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"

    def edit(change):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return edit


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "model.norm.weight is missing"),
        (without("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (
            lambda t: t | {"model.norm.weight": t["model.norm.weight"][:50].clone()},
            r"norm.weight is \[50\], the model's",
        ),
    ],
)
def test_sources_that_are_not_whole_are_refused(tiny_llama, tmp_path, change, message):
    """Of what is not quantized: else the checkpoint could not be loaded."""
    single(tiny_llama, tmp_path / "source")(change)
    with pytest.raises(flexq.ModelError, match=message):
        flexq.quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_head_that_its_tied_embedding_is_stored_as(tiny_llama, tmp_path):
    assert tiny_llama.config.tie_word_embeddings
    edit = single(tiny_llama, tmp_path / "source")
    edit(lambda t: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in t.items()})
    plan = flexq.Plan(layers={"lm_head": flexq.LayerConfig(weight_bits=8)})
    flexq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", plan)
    assert torch.equal(logits(flexq.load_model(tmp_path / "out")), logits(flexq.quantize_model(tiny_llama, plan)))


def test_of_a_file_and_shards_the_file_counts(tiny_llama, tmp_path):
    """As when transformers loads them; `save_pretrained` leaves what was in the folder."""
    source = tmp_path / "source"
    tiny_llama.save_pretrained(source, max_shard_size="50KB")
    with torch.no_grad():
        tiny_llama.model.norm.weight.mul_(2)
    tensors = {n: t.clone() for n, t in tiny_llama.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, source / checkpoint.SINGLE, metadata={"format": "pt"})
    flexq.quantize_checkpoint(source, tmp_path / "out")
    quantized = flexq.quantize_model(AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(logits(flexq.load_model(tmp_path / "out")), logits(quantized))

    quantized.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    shutil.copy(tmp_path / "out" / checkpoint.SINGLE, tmp_path / "saved")
    with pytest.raises(flexq.CheckpointError, match=r"holds both model.safetensors, which is what is loaded, and"):
        verify_files(tmp_path / "saved")


def test_float64_is_refused_before_the_work(tiny_llama, tmp_path):
    tiny_llama.double().save_pretrained(tmp_path / "float")
    with pytest.raises(flexq.ModelError, match="is in float64; FlexQ takes float32, float16 and bfloat16"):
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "out")


def test_adapters_are_not_quantized(tiny_folder, tmp_path):
    (tiny_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(flexq.ModelError, match="holds a PEFT adapter beside the model; load it with peft"):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")


def test_values_beyond_the_stored_type_are_refused(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] = 1e5
    tiny_llama.save_pretrained(tmp_path / "source")
    with pytest.raises(flexq.ModelError, match=r"model.norm.weight has values up to 1e\+05, float16 up to 65504"):
        flexq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32, .* got torch.int8"):
        flexq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", dtype=torch.int8)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(saved):
    model, folder = saved
    with pytest.raises(FileExistsError, match="exists"):
        flexq.save_model(model, folder)
    flexq.save_model(model, folder, overwrite=True)
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []
    file = folder / "config.json"
    with pytest.raises(FileExistsError, match="a file"):
        flexq.save_model(model, file, overwrite=True)
    assert file.is_file()
    (folder.parent / "empty").mkdir()
    flexq.save_model(model, folder.parent / "empty")
    assert sorted(p.name for p in (folder.parent / "empty").iterdir()) == sorted(p.name for p in folder.iterdir())


def edit(folder, change) -> None:
    """Rewrite the single shard with other tensors under the old metadata."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = {name: t.clone() for name, t in tensors_of(folder).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)


LAYER = "model.layers.1.mlp.down_proj"


def flip(tensors):
    tensors[f"{LAYER}.qweight"][0, 0, 0, 0] ^= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, rf"tensor {LAYER}\.qweight has changed"),
        (lambda t: t.pop(f"{LAYER}.scales"), rf"tensor {LAYER}\.scales is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra does not belong there"),
    ],
)
def test_edited_files_are_refused(saved, change, message):
    edit(saved[1], change)
    with pytest.raises(flexq.CheckpointError, match=message):
        flexq.load_model(saved[1])


def test_truncated_and_foreign_files_are_refused(saved):
    folder = saved[1]
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(flexq.CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        flexq.load_model(folder)
    file.write_bytes(b"PK\x03\x04 not safetensors")
    with pytest.raises(flexq.CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        flexq.load_model(folder)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(flexq.CheckpointError, match="is missing from the checkpoint"):
        flexq.load_model(folder)


def test_configs_from_elsewhere_are_refused(saved):
    folder = saved[1]
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format_version": 3}, "FlexQ format version 3; this FlexQ reads 1 and 2"),
        ({"plan": {"format": "other"}}, "not a plan"),
    ):
        broken = folder.parent / "broken"
        shutil.copytree(folder, broken)
        settings = config | {"quantization_config": config["quantization_config"] | change}
        (broken / "config.json").write_text(json.dumps(settings))
        with pytest.raises(flexq.CheckpointError, match=message):
            flexq.load_model(broken)
        shutil.rmtree(broken)


def test_unquantized_models_are_not_saved(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no quantized layer"):
        flexq.save_model(tiny_llama, tmp_path / "x")


def test_experts_in_floating_point_are_stored_as_transformers_stores_them(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")
    names = {n for n in tensors_of(tmp_path / "float") if "self_attn" not in n}
    skip = ["*.experts"]
    with pytest.warns(UserWarning, match="left in floating point: model.layers.0.mlp.experts"):
        model = flexq.quantize_model(model, skip=skip)
    flexq.save_model(model, tmp_path / "quantized")
    assert {n for n in tensors_of(tmp_path / "quantized") if "self_attn" not in n} == names
    loaded = flexq.load_model(tmp_path / "quantized")
    assert loaded.config.architectures == ["MixtralForCausalLM"]
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="left in floating point"):
        flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", skip=skip)
    assert torch.equal(logits(flexq.load_model(tmp_path / "disk")), logits(model))


@pytest.mark.parametrize("kind", ["xlm-roberta", "camembert"])
def test_heads_that_come_before_the_embeddings_they_are_tied_to(kind, tmp_path):
    """Files have the embeddings, as those of transformers do; with the head's tensor in their place they load too."""
    config = AutoConfig.for_model(
        kind, vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = flexq.quantize_model(AutoModelForMaskedLM.from_config(config).eval())
    flexq.save_model(model, tmp_path / "saved")
    embeddings, head = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert embeddings in tensors and head not in tensors
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        expected = model(ids).logits
        assert torch.equal(flexq.load_model(tmp_path / "saved")(ids).logits, expected)
        model.save_pretrained(tmp_path / "other")
        tensors = load_file(tmp_path / "other" / "model.safetensors")
        tensors[head] = tensors.pop(embeddings)
        save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(flexq.load_model(tmp_path / "other")(ids).logits, expected)


def test_two_tensors_of_one_name_are_not_written(tmp_path):
    writer = ShardWriter(tmp_path, 1 << 20, "hash")
    writer.add("x", torch.zeros(1))
    with pytest.raises(flexq.ModelError, match="several of the model's tensors would be x in its files"):
        writer.add("x", torch.ones(1))


def test_a_missing_layer_is_found_without_the_model(saved):
    """As vLLM asks, which has classes of its own."""
    folder = saved[1]
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.qweight"], tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(flexq.CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.qweight is missing"):
        verify_files(folder)
