"""Others' quantized checkpoints become FlexQ's, with the codes and scales that they have."""

import json
from pathlib import Path

import flexq
import pytest
import torch
from flexq import ops
from flexq.cli.main import main
from flexq.linear import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

compressed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K] and scales float16 [N, K / group], group 0 being a row."""
    n, k = weight.shape
    rows = weight.reshape(n, -1, group or k)
    scales = (rows.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    codes = (rows / scales.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.reshape(n, k).to(torch.int8), scales


@pytest.fixture
def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def write(model, folder: Path, settings: dict, pack) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A checkpoint whose linear layers but the head are `pack`ed; their codes and scales."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    made = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer = name.removesuffix(".weight")
        codes, scales, packed = pack(tensors.pop(name).float())
        made[layer] = codes, scales
        tensors |= {f"{layer}.{tensor}": value.contiguous() for tensor, value in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return made


def compressed_settings(bits: int, group: int, **weights) -> dict:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, **strategy, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


def compressed_pack(bits: int, group: int):
    def pack(weight):
        codes, scales = rounded(weight, bits, group)
        packed = {"weight_packed": compressed.pack_to_int32(codes, bits), "weight_scale": scales.to(torch.bfloat16)}
        packed["weight_shape"] = torch.tensor(weight.shape)
        return codes, scales.to(torch.bfloat16), packed

    return pack


def padded_pack(bits: int, group: int):
    """As earlier versions of the library pack 5 and 6 bits: whole codes in each word."""

    def pack(weight):
        codes, scales, packed = compressed_pack(bits, group)(weight)
        per = 32 // bits
        values = codes.long() + (1 << (bits - 1))
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % per)).reshape(codes.shape[0], -1, per)
        packed["weight_packed"] = sum(values[..., i] << (bits * i) for i in range(per)).to(torch.int32)
        return codes, scales, packed

    return pack


def gptq_pack(bits: int, group: int, zero: int = -1, act_order: bool = False):
    def words(values: torch.Tensor) -> torch.Tensor:
        """[R, C] of 0 .. 2^bits - 1 to int32 [R / p, C], as the format has them."""
        per = 32 // bits
        parts = values.to(torch.int64).reshape(-1, per, values.shape[1])
        total = sum(parts[:, i] << (bits * i) for i in range(per))
        return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)

    def pack(weight):
        codes, scales = rounded(weight, bits, group)
        n, k = weight.shape
        zeros = torch.full((n, scales.shape[1]), (1 << (bits - 1)) + zero)
        order = torch.arange(k, dtype=torch.int32) // (group or k)
        packed = {
            "qweight": words(codes.t().int() + (1 << (bits - 1))), "qzeros": words(zeros).t(), "scales": scales.t(),
            "g_idx": order.flip(0) if act_order else order,
        }  # fmt: skip
        return codes, scales, packed

    return pack


def gptq_settings(bits: int, group: int, **more) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": True, "desc_act": False, **more}


def check(folder: Path, made, bits: int, group: int) -> None:
    """Every layer has the codes and scales that were written, and the model runs."""
    model = flexq.load_model(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    assert layers.keys() == made.keys()
    for name, layer in layers.items():
        planes, scales = layer.canonical()
        codes, expected = made[name]
        assert planes.shape[2] == bits
        assert torch.equal(ops.unpack_codes(planes)[:, : codes.shape[1]], codes)
        assert torch.equal(scales.float(), expected.float())
        dequantized = codes.float() * expected.float().repeat_interleave(group or codes.shape[1], 1)
        assert torch.equal(layer.dequantize(torch.float32), dequantized)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("bits", (4, 5, 6, 8))
@pytest.mark.parametrize("group", (128, 0))
def test_compressed_tensors(float_model, tmp_path, bits, group):
    made = write(float_model, tmp_path / "given", compressed_settings(bits, group), compressed_pack(bits, group))
    done = flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    assert (done.method, done.bits, done.layers) == ("compressed-tensors", bits, 14)
    assert "now 8 bits with a scale per token" in done.changes[0]
    check(tmp_path / "ours", made, bits, group)


@pytest.mark.parametrize("bits", (5, 6))
def test_compressed_tensors_of_earlier_versions(float_model, tmp_path, bits):
    made = write(float_model, tmp_path / "given", compressed_settings(bits, 128), padded_pack(bits, 128))
    flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    check(tmp_path / "ours", made, bits, 128)


def test_as_the_library_reads_it(float_model, tmp_path):
    """The weights that transformers and compressed-tensors make of the same files."""
    write(float_model, tmp_path / "given", compressed_settings(4, 128), compressed_pack(4, 128))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    theirs(torch.arange(4)[None])  # decompresses what it has not yet
    flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    for name, layer in flexq.load_model(tmp_path / "ours").named_modules():
        if isinstance(layer, Linear):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(layer.dequantize(weight.dtype), weight)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("group", (128, 0))
def test_gptq(float_model, tmp_path, bits, group):
    made = write(float_model, tmp_path / "given", gptq_settings(bits, group), gptq_pack(bits, group))
    assert main(["convert", str(tmp_path / "given"), "-o", str(tmp_path / "ours"), "--quiet"]) == 0
    check(tmp_path / "ours", made, bits, group)


def test_gptq_of_its_second_version(float_model, tmp_path):
    settings = gptq_settings(4, 128, checkpoint_format="gptq_v2")
    made = write(float_model, tmp_path / "given", settings, gptq_pack(4, 128, zero=0))
    flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    check(tmp_path / "ours", made, 4, 128)


def test_autoround(float_model, tmp_path):
    settings = {**gptq_settings(4, 128), "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    made = write(float_model, tmp_path / "given", settings, gptq_pack(4, 128))
    flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    check(tmp_path / "ours", made, 4, 128)


def wide_scales(weight):
    codes, scales, packed = compressed_pack(4, 128)(weight)
    packed["weight_scale"] = scales.float() * 1.0001
    return codes, scales, packed


def short_scales(weight):
    codes, scales, packed = compressed_pack(4, 128)(weight)
    packed["weight_scale"] = packed["weight_scale"][:, :1]
    return codes, scales, packed


REFUSED = {
    "bits": (compressed_settings(3, 128), compressed_pack(4, 128), "weights must have 4, 5, 6, 8 bits, got 3"),
    "group": (compressed_settings(4, 64), compressed_pack(4, 64), "a scale per row or per 128 inputs, got one per 64"),
    "zeros": (compressed_settings(4, 128, symmetric=False), compressed_pack(4, 128), "these have zero points"),
    "order": (compressed_settings(4, 128, actorder="group"), compressed_pack(4, 128), "actorder is group"),
    "format": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, compressed_pack(4, 128), "pack-quan"),
    "method": ({"quant_method": "awq"}, compressed_pack(4, 128), "got awq"),
    "scales": (compressed_settings(4, 128), wide_scales, "scales are no float16 numbers"),
    "shape": (compressed_settings(4, 128), short_scales, r"down_proj.weight_scale must be \[256, 3\], got"),
    "transforms": (
        compressed_settings(4, 128) | {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
        compressed_pack(4, 128),
        "transform_config must be empty",
    ),
    "sparsity": (
        compressed_settings(4, 128) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        compressed_pack(4, 128),
        "weights must be dense",
    ),
    "groups": (
        compressed_settings(4, 128) | {"config_groups": [None]},
        compressed_pack(4, 128),
        "an object of objects",
    ),
    "gptq zeros": (gptq_settings(4, 128), gptq_pack(4, 128, zero=0), "its stored zero points are not all 7"),
    "gptq order": (gptq_settings(4, 128), gptq_pack(4, 128, act_order=True), "act-order"),
    "gptq asymmetric": (gptq_settings(4, 128, sym=False), gptq_pack(4, 128), "sym is false"),
    "gptq bits": (gptq_settings(5, 128), gptq_pack(4, 128), "GPTQ's bits must be 4 or 8, got 5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(float_model, tmp_path, what):
    settings, pack, message = REFUSED[what]
    write(float_model, tmp_path / "given", settings, pack)
    with pytest.raises(flexq.ModelError, match=message):
        flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["given"]


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_the_model_has_no_place_for_are_left_out(float_model, tmp_path):
    """Rotary frequencies of old, zeros where a layer has no bias, scales of a quantized cache."""
    settings = compressed_settings(4, 128) | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    made = write(float_model, tmp_path / "given", settings, compressed_pack(4, 128))
    layer = "model.layers.0.self_attn"
    extra = {f"{layer}.rotary_emb.inv_freq": 32, f"{layer}.q_proj.bias": 256, f"{layer}.k_proj.k_scale": 1}
    edit(tmp_path / "given", lambda tensors: tensors.update({n: torch.zeros(size) for n, size in extra.items()}))
    done = flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    check(tmp_path / "ours", made, 4, 128)
    assert any("left out" in change and "inv_freq" in change for change in done.changes)
    assert any(change.startswith("KV cache: 8 bits before") for change in done.changes)
    edit(tmp_path / "given", lambda tensors: tensors[f"{layer}.q_proj.bias"].fill_(1))
    with pytest.raises(flexq.ModelError, match=r"q_proj.bias is not zero, and the model's layer has no bias"):
        flexq.convert_checkpoint(tmp_path / "given", tmp_path / "again")


def test_quantized_heads_are_refused(float_model, tmp_path):
    write(float_model, tmp_path / "given", compressed_settings(4, 128), compressed_pack(4, 128))
    edit(tmp_path / "given", lambda t: t.update({"lm_head.weight_packed": t.pop("lm_head.weight").to(torch.int32)}))
    with pytest.raises(flexq.ModelError, match="lm_head is a quantized LM head, which is not converted"):
        flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")


def test_missing_tensors_are_refused(float_model, tmp_path):
    write(float_model, tmp_path / "given", compressed_settings(4, 128), compressed_pack(4, 128))
    edit(tmp_path / "given", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(flexq.ModelError, match=r"could not be loaded, and is not kept: .*model.norm.weight is missing"):
        flexq.convert_checkpoint(tmp_path / "given", tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["given"]


def test_models_in_floating_point_are_refused(float_model, tmp_path):
    float_model.save_pretrained(tmp_path / "float")
    with pytest.raises(flexq.ModelError, match="quant_method must be compressed-tensors, gptq or auto-round"):
        flexq.convert_checkpoint(tmp_path / "float", tmp_path / "ours")
