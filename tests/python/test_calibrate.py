"""Compensated rounding and calibration, on matrices and on small random models of several architectures."""

import flexq
import pytest
import torch
from flexq import ops
from flexq.linear import Linear
from flexq.plan import LayerConfig, Plan
from flexq.quantize import fisher
from flexq.quantize.fisher import token_weights
from flexq.quantize.hessian import Hessian, rotate
from flexq.quantize.layers import shared_copy
from flexq.quantize.model import quantize_model
from flexq.quantize.outcome import outcome
from flexq.quantize.rounding import compensated_round
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=16),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),  # biases
    "qwen3": Qwen3Config(**SMALL, head_dim=20),  # norms of queries and keys, an odd head
    "gemma2": Gemma2Config(**SMALL, head_dim=20),  # four norms a block, tied embeddings
    "phi3": Phi3Config(**SMALL),  # one layer for q, k and v, one for gate and up
}


def model_of(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()


def windows(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 96, (1, 40), generator=generator) for _ in range(count)]


def correlated(rows: int, k: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(rows, 12) @ torch.randn(12, k) + 0.3 * torch.randn(rows, k)


def output_error(planes, scales, weight, x, config) -> float:
    back = ops.dequantize_weight(planes, scales, weight.shape[1], config.scheme, config.rotation)
    return (x @ (back - weight).T).square().mean().item()


@pytest.mark.parametrize("scheme", ("group", "channel"))
@pytest.mark.parametrize("rotation", ("none", "hadamard128"))
@pytest.mark.parametrize("bits", (4, 5, 6, 8))
@pytest.mark.parametrize("k", (64, 100, 300))
def test_beats_rounding_to_nearest_on_its_inputs(k, bits, rotation, scheme):
    config = LayerConfig(scheme=scheme, rotation=rotation, weight_bits=bits)
    weight, x = torch.randn(40, k), correlated(500, k)
    hessian = Hessian(k, weight.device)
    for part in x.split(100):
        hessian.add(part)
    rounded = compensated_round(weight, hessian, config)
    nearest = ops.quantize_weight(weight, scheme, rotation, bits)
    assert rounded[0].shape == nearest[0].shape and rounded[1].shape == nearest[1].shape
    assert output_error(*rounded, weight, x, config) < 0.6 * output_error(*nearest, weight, x, config)


def test_a_second_pass_only_helps():
    weight, x = torch.randn(30, 256), correlated(400, 256)
    hessian = Hessian(256, weight.device)
    hessian.add(x)
    errors = [
        output_error(*compensated_round(weight, hessian, LayerConfig(), passes=p), weight, x, LayerConfig())
        for p in (0, 1, 2)
    ]
    assert errors[1] <= errors[0] and errors[2] <= errors[1]


def in_halves(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], x.device)
    for half in range(2):
        hessian.add(x[half::2], half=half)
    return hessian


def test_correlations_of_few_samples_are_shrunk(monkeypatch):
    """Other inputs of the same kind are better off for it."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256), torch.randn(4096, 256) @ (torch.randn(256, 256) * torch.linspace(0, 2, 256)).T
    config = LayerConfig(scheme="channel", rotation="none")
    hessian, others = in_halves(x[:96]), x[96:]
    assert hessian.shrinkage("none", 0.01) >= 0.35
    better = output_error(*compensated_round(weight, hessian, config), weight, others, config)
    monkeypatch.setattr(Hessian, "shrinkage", lambda self, rotation, damping: 0.0)
    assert better < 0.8 * output_error(*compensated_round(weight, hessian, config), weight, others, config)


@pytest.mark.parametrize("rotation", ("none", "hadamard128"))
def test_correlations_of_many_samples_are_believed(rotation):
    assert in_halves(correlated(4000, 200)).shrinkage(rotation, 0.01) <= 0.05
    assert in_halves(correlated(60, 200)).shrinkage(rotation, 0.01) <= 0.1  # of few factors
    independent = torch.randn(4000, 200)
    assert in_halves(independent).shrinkage("none", 0.01) >= 0.35


def test_halves_without_inputs():
    hessian = Hessian(8, torch.device("cpu"))
    assert torch.equal(hessian.mean("none", 0.01), torch.eye(128))
    hessian.add(torch.ones(4, 8), half=1)
    mean = hessian.mean("none", 0.01)[:8, :8]
    assert torch.equal(mean.diagonal(), torch.ones(8)) and (mean - torch.eye(8)).max() == pytest.approx(0.9)


@pytest.mark.parametrize(
    "x",
    (
        torch.randn(3, 200),  # fewer samples than inputs
        torch.cat([torch.randn(50, 150), torch.zeros(50, 50)], 1),  # dead channels
        torch.zeros(10, 200),  # nothing but dead channels
        torch.ones(10, 200),  # rank one
    ),
)
def test_deficient_inputs(x):
    weight = torch.randn(20, 200)
    hessian = Hessian(200, weight.device)
    hessian.add(x)
    config = LayerConfig()
    planes, scales = compensated_round(weight, hessian, config)
    assert torch.isfinite(ops.dequantize_weight(planes, scales, 200)).all()
    nearest = ops.quantize_weight(weight)
    assert output_error(planes, scales, weight, x, config) <= 1.01 * output_error(*nearest, weight, x, config)


def test_a_large_weight_is_rounded_a_slice_of_rows_at_a_time(monkeypatch):
    weight, x = torch.randn(50, 256), correlated(500, 256)
    hessian = Hessian(256, weight.device)
    hessian.add(x)
    whole = compensated_round(weight, hessian, LayerConfig(scheme="channel"))
    monkeypatch.setattr("flexq.quantize.rounding._SLICE", 256 * 16)  # the last one has 2 rows
    sliced = compensated_round(weight, hessian, LayerConfig(scheme="channel"))
    assert all(a.shape == b.shape and (a == b).float().mean() > 0.99 for a, b in zip(sliced, whole, strict=True))
    weight[49, 0] = torch.nan
    with pytest.raises(ValueError, match="weights must be finite"):
        compensated_round(weight, hessian, LayerConfig())


def test_zero_weights_and_no_rows():
    hessian = Hessian(130, torch.device("cpu"))
    hessian.add(torch.randn(20, 130))
    planes, scales = compensated_round(torch.zeros(4, 130), hessian, LayerConfig())
    assert not planes.any() and not scales.any()
    planes, scales = compensated_round(torch.zeros(0, 130), hessian, LayerConfig())
    assert planes.shape == (0, 2, 6, 16) and scales.shape == (0, 2)


def test_rotation_is_the_librarys():
    x = torch.randn(3, 256)
    codes, scales = flexq.activation_codes(flexq.quantize_activation(x, 8), 3, 256, 8, "group", "hadamard128")
    mine = rotate(x, "hadamard128").view(3, 2, 128)
    theirs = codes.view(3, 2, 128) * scales.unsqueeze(-1)
    assert ((mine - theirs).abs() <= 0.51 * scales.unsqueeze(-1)).all()


def test_bad_values():
    hessian = Hessian(128, torch.device("cpu"))
    with pytest.raises(ValueError, match="not finite"):
        hessian.add(torch.full((1, 128), torch.nan))
    hessian.add(torch.randn(5, 128))
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weights must be finite"):
            compensated_round(torch.full((2, 128), value), hessian, LayerConfig())
    with pytest.raises(ValueError, match="float16 scales cannot hold"):
        compensated_round(torch.full((2, 128), 1e9), hessian, LayerConfig())


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(w).logits for w in windows()])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calibrated_models_are_closer_and_load_again(name, tmp_path):
    model = model_of(name)
    reference = logits(model)
    nearest = logits(quantize_model(shared_copy(model)))
    calibrated = flexq.calibrate_model(shared_copy(model), windows())
    count = sum(isinstance(m, Linear) for m in calibrated.modules())
    assert count == len(calibrated.flexq_plan.layers) > 0
    out = logits(calibrated)
    assert (out - reference).square().mean() < (nearest - reference).square().mean()
    flexq.save_model(calibrated, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(loaded), out)
    assert loaded.flexq_plan.produced_by["rounding"] == "compensated"


def test_layers_that_the_plan_leaves_stay():
    plan = Plan(layers={"*.down_proj": None, "*.q_proj": LayerConfig(act_bits=6, scheme="channel")})
    model = flexq.calibrate_model(model_of("llama"), windows(), plan)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert isinstance(mlp.down_proj, torch.nn.Linear) and attention.q_proj.config.scheme == "channel"


def test_failure_leaves_the_model_as_it_was():
    model = model_of("llama")
    before = logits(model)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        kept = weight[0, 0].item()
        weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: weight\[\d+\]\[\d+\] is .*; weights must be finite"
    ):
        flexq.calibrate_model(model, windows())
    with torch.no_grad():
        weight[0, 0] = kept
    assert not any(isinstance(m, Linear) for m in model.modules())
    assert torch.equal(logits(model), before)


def test_inputs_that_are_not_finite_name_their_layer():
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.self_attn\.q_proj: the calibration text"):
        flexq.calibrate_model(model, windows())


def test_needs_text_and_blocks():
    with pytest.raises(ValueError, match="at least one window"):
        flexq.calibrate_model(model_of("llama"), [])
    with pytest.raises(ValueError, match="takes no input_ids"):
        flexq.calibrate_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), windows())
    with pytest.raises(ValueError, match="matches no linear layer"):
        flexq.calibrate_model(model_of("llama"), windows(), Plan(layers={"nowhere": None}))


def test_goes_on_after_an_interruption(tmp_path):
    text = windows()
    whole = flexq.calibrate_model(model_of("llama"), text, "w6a6")

    def stop_after(count):
        def steps(names):
            for i, name in enumerate(names):
                if i == count:
                    raise KeyboardInterrupt
                yield name

        return steps

    layers = sum(isinstance(m, Linear) for m in whole.modules())
    model = model_of("llama")
    with pytest.raises(KeyboardInterrupt):
        flexq.calibrate_model(model, text, "w6a6", progress=stop_after(layers - 2), resume=tmp_path)
    assert not any(isinstance(m, flexq.Linear) for m in model.modules())
    files = sorted(f.name for f in tmp_path.iterdir())
    assert "block-0000.safetensors" in files and not any(f.endswith(".part") for f in files)
    stamp = (tmp_path / "block-0000.safetensors").stat().st_mtime_ns
    resumed = flexq.calibrate_model(model, text, "w6a6", resume=tmp_path)
    assert (tmp_path / "block-0000.safetensors").stat().st_mtime_ns == stamp
    with torch.inference_mode():
        assert torch.equal(resumed(text[0]).logits, whole(text[0]).logits)
    with pytest.raises(ValueError, match="belongs to another calibration"):
        flexq.calibrate_model(model_of("llama"), text, "w6a8", resume=tmp_path)


def test_weights_count_inputs_so_many_times():
    x, weights = torch.randn(5, 130), torch.tensor([2.0, 0.0, 1.0, 1.0, 3.0])
    weighed, repeated = Hessian(130, x.device), Hessian(130, x.device)
    weighed.add(x, weights)
    repeated.add(x.repeat_interleave(weights.long(), 0))
    assert weighed.count == repeated.count == 7
    torch.testing.assert_close(weighed.sums, repeated.sums)


def test_tokens_weigh_what_the_output_minds():
    model, text = model_of("qwen3"), windows()
    names = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.k_proj", "mlp.down_proj")]
    weights = token_weights(model, text, names)
    for name in names:
        each = torch.cat(weights[name])
        assert each.shape == (3 * 40,) and (each >= 0).all() and each.mean().item() == pytest.approx(1)
    # Nothing is predicted from a window's last token, and after the last layer no other token sees it.
    assert all(w[-1] == 0 and (w[:-1] > 0).all() for w in weights["model.layers.1.mlp.down_proj"])
    assert all(p.requires_grad for p in model.parameters())
    again = token_weights(model, text, names)
    assert all(torch.equal(a, b) for name in names for a, b in zip(weights[name], again[name], strict=True))


def test_backward_block_by_block_is_the_whole_models():
    model, text = model_of("gemma2"), windows(1)[0]
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    gradients, expected = {}, {}

    def watcher(name):
        return lambda x, output: lambda gradient: gradients.update({name: gradient})

    count = fisher.backward(model, text, {name: watcher(name) for name in names}, seed=3)
    assert count == 39
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: output.register_hook(lambda g: expected.update({name: g})) and None
        )
        for name in names
    ]
    outcome(model, text).log_likelihood(3).backward()
    for handle in handles:
        handle.remove()
    assert set(gradients) == set(names)
    for name in names:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


def test_blocks_on_a_device_one_at_a_time():
    model, text = model_of("qwen2"), windows()
    whole = flexq.calibrate_model(shared_copy(model), text)
    moved = flexq.calibrate_model(shared_copy(model), text, device="cpu")
    assert torch.equal(logits(moved), logits(whole))


def test_damaged_or_foreign_blocks_count_as_absent(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    text = windows()
    whole = flexq.calibrate_model(model_of("llama"), text, "w6a6", resume=tmp_path / "resume")
    expected = logits(whole)
    first, second = sorted((tmp_path / "resume").glob("block-*"))

    def change(file, tensors=lambda t: None, metadata=lambda m: m):
        with safe_open(file, framework="pt") as handle:
            held = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
            old = handle.metadata()
        tensors(held)
        save_file(held, file, metadata=metadata(old))

    def flip(held):
        next(t for n, t in held.items() if n.endswith("qweight"))[0, 0, 0, 0] ^= 1

    damages = (
        lambda: change(first, flip),
        lambda: change(first, metadata=lambda m: {}),
        lambda: change(first, metadata=lambda m: m | {"flexq.calibration": "{}"}),
        lambda: first.write_bytes(first.read_bytes()[:1000]),
        lambda: first.write_bytes(second.read_bytes()),
        first.unlink,
    )
    for damage in damages:
        damage()
        again = flexq.calibrate_model(model_of("llama"), text, "w6a6", resume=tmp_path / "resume")
        assert torch.equal(logits(again), expected)
    with torch.no_grad():
        other = model_of("llama")
        other.model.norm.weight[0] += 1  # no quantized layer's
    with pytest.raises(ValueError, match="belongs to another calibration"):
        flexq.calibrate_model(other, text, "w6a6", resume=tmp_path / "resume")
