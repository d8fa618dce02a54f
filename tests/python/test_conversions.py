"""Models whose files hold weights under other names, or several layers' in one tensor, which transformers splits."""

import flexq
import pytest
import torch
import transformers
from architectures import Architecture, answer
from flexq.checkpoint.verify import verify
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the weights")
WINDOWS = [torch.randint(3, 250, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(2)]
NOMIC = Architecture("nomic_bert", "encoder", "AutoModel")
HRM = Architecture("hrm_text", overrides={"num_hidden_layers": 2})
LLAMA = Architecture("llama")


def names_in(folder) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("skip", [(), ("*.q_proj",), ("*.k_proj",), ("*.[qkv]_proj",), ("*.gate_proj",)])
@pytest.mark.parametrize("architecture", [NOMIC, HRM], ids=lambda a: a.kind)
def test_weights_that_are_split(architecture, skip, tmp_path):
    """Some of the parts quantized, or all: the same from memory, from disk to disk and while loading."""
    model = architecture.model()
    model.save_pretrained(tmp_path / "float")
    assert any(name.endswith(("attn.Wqkv.weight", "attn.gqkv_proj.weight")) for name in names_in(tmp_path / "float"))
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk", skip=skip)
    auto = getattr(transformers, architecture.auto)
    config = flexq.FlexQConfig("w6a8", skip=list(skip))
    loaded = auto.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    quantized = flexq.quantize_model(model, skip=skip)
    expected = answer(architecture, quantized)
    assert torch.equal(answer(architecture, loaded), expected)
    loaded.save_pretrained(tmp_path / "loaded")
    quantized.save_pretrained(tmp_path / "saved")
    flexq.save_model(quantized, tmp_path / "model")
    for folder in ("disk", "loaded", "saved", "model"):
        assert names_in(tmp_path / folder) == names_in(tmp_path / "disk")
        assert verify(tmp_path / folder).keys
        assert torch.equal(answer(architecture, flexq.load_model(tmp_path / folder)), expected), folder
        assert torch.equal(answer(architecture, auto.from_pretrained(tmp_path / folder).eval()), expected), folder


def test_weights_that_are_split_and_left_are_written_whole(tmp_path):
    """From files a block at a time too, as transformers' own files have them."""
    model, skip = NOMIC.model(), ["*.[qkv]_proj"]
    model.save_pretrained(tmp_path / "float")
    flexq.calibrate_checkpoint(tmp_path / "float", tmp_path / "disk", WINDOWS, skip=skip)
    flexq.save_model(flexq.calibrate_model(model, WINDOWS, skip=skip), tmp_path / "memory")
    given, disk, memory = (load_file(tmp_path / f / "model.safetensors") for f in ("float", "disk", "memory"))
    left = [name for name in given if name.endswith("attn.Wqkv.weight")]
    assert len(left) == 2 and all(torch.equal(disk[name], given[name]) for name in left)
    assert disk.keys() == memory.keys() and all(torch.equal(disk[name], memory[name]) for name in memory)


def test_biases_that_are_split(tmp_path):
    """TIPSv2's q, k and v have a bias in files, and so do they once they are quantized."""
    if "tipsv2_vision_model" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no TIPSv2")
    settings = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("tipsv2_vision_model", **settings)
    model = transformers.AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "float")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    quantized = flexq.quantize_model(model)
    quantized.save_pretrained(tmp_path / "saved")
    flexq.save_model(quantized, tmp_path / "model")
    pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        expected = quantized(pixels).last_hidden_state
        for folder in ("disk", "saved", "model"):
            assert names_in(tmp_path / folder) == names_in(tmp_path / "disk")
            assert torch.equal(flexq.load_model(tmp_path / folder)(pixels).last_hidden_state, expected), folder


def test_weights_under_other_names_than_their_layers(tmp_path, monkeypatch):
    """`mlp.to_up` is `mlp.up_proj.weight`, and `mlp.gates.weight` is `mlp.gate_proj.weight`, by rules for these tensors
    alone."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    rules = [
        WeightRenaming(r"mlp\.to_up", "mlp.up_proj.weight"),
        WeightRenaming(r"mlp\.gates\.weight", "mlp.gate_proj.weight"),
    ]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", rules)
    model = LLAMA.model()
    model.save_pretrained(tmp_path / "float")
    assert {"model.layers.0.mlp.to_up", "model.layers.0.mlp.gates.weight"} <= names_in(tmp_path / "float")
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "disk")
    quantized = flexq.quantize_model(model)
    quantized.save_pretrained(tmp_path / "saved")
    flexq.save_model(quantized, tmp_path / "model")
    for folder in ("disk", "saved", "model"):
        assert names_in(tmp_path / folder) == names_in(tmp_path / "disk")
        assert torch.equal(answer(LLAMA, flexq.load_model(tmp_path / folder)), answer(LLAMA, quantized)), folder
