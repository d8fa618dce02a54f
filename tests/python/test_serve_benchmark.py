"""What benchmarks/serve_gpu.py gives to vLLM, as far as it can be looked at without a GPU."""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from flexq.plan import Plan

quantization = pytest.importorskip("compressed_tensors.quantization")


@pytest.fixture(scope="module")
def serve():
    file = Path(__file__).parents[2] / "benchmarks" / "serve_gpu.py"
    spec = importlib.util.spec_from_file_location("serve_gpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(serve, shape: str):
    """A benchmark's model with two small layers, on the meta device."""
    settings = serve.SHAPES[shape] | {
        "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
    }  # fmt: skip
    if "num_experts" in settings:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    names = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(settings["model_type"], **names)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-32b", "qwen3-30b-a3b"])
def test_int8_is_w8a8_of_every_linear_layer_but_head_and_routers(serve, shape):
    """By the library whose format it is: weights with a scale for each row, activations with one for each token."""
    config = json.loads(json.dumps(serve.CONTENDERS["int8"]["config"]))  # as config.json has it
    assert config.pop("quant_method") == "compressed-tensors"
    model = small(serve, shape)
    quantization.apply_quantization_config(model, quantization.QuantizationConfig.model_validate(config))
    linear = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in linear.items()}
    left = {name for name, scheme in schemes.items() if scheme is None}
    assert left == {name for name in linear if name == "lm_head" or name.endswith("mlp.gate")}
    assert len(schemes) - len(left) >= 8
    for scheme in filter(None, schemes.values()):
        weights, inputs = scheme.weights, scheme.input_activations
        assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric) == (8, "int", "channel", True)
        assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.symmetric) == (8, "int", "token", True)
        assert inputs.dynamic and not weights.dynamic


def test_plans_and_variables_are_read(serve):
    for name, contender in serve.CONTENDERS.items():
        if "plan" in contender:
            assert Plan.of(contender["plan"]).defaults.act_bits == 8, name
        for variable, value in contender.get("environment", {}).items():
            assert isinstance(json.loads(value), (dict, int)), variable
    assert set(serve.DEFAULT_CONTENDERS) <= set(serve.CONTENDERS)


def test_contenders_at_once_have_gpus_of_their_own(serve, monkeypatch, tmp_path):
    seen, together, most = {}, set(), []

    def run(name, arguments, gpus):
        seen[name] = gpus
        assert gpus not in together
        together.add(gpus)
        most.append(len(together))
        time.sleep(0.05)
        together.remove(gpus)
        return {"failed": 0}

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    names = ["bf16", "fp8", "int8"]
    out = tmp_path / "results.json"
    arguments = argparse.Namespace(at_once=2, tensor_parallel=2, contenders=names, out=out)
    assert list(serve.run_all(arguments)) == names and max(most) == 2
    assert set(seen.values()) == {"3,5", "6,7"} and set(json.loads(out.read_text())) == set(names)
    arguments.at_once = 1
    assert list(serve.run_all(arguments)) == names and set(seen.values()) == {None}
    arguments.at_once = 3
    with pytest.raises(SystemExit, match="3 contenders at once need 2 GPUs each, there are 4"):
        serve.run_all(arguments)
