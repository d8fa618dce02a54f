"""What vLLM does on GPUs beyond tests/vllm/test_offline.py: compiled graphs and what is fused in them, LoRA, KV caches
in fp8, cached prefixes, chunked prefill, speculation, sleep, sharded states, experts, several GPUs. What a CPU can do
runs there too. Models are small, random, and have no tokenizer."""

import json
from pathlib import Path

import flexq
import pytest
import torch
from engines import (
    DEVICE,
    GPUS,
    assert_alike,
    assert_same,
    assert_same_as,
    engine,
    greedy,
    random_model,
    save_sharded_state,
    shut,
)
from flexq.cli.main import main
from plans import MIXED
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm.lora.request import LoRARequest

VOCABULARY = 1024
BEST = flexq.Plan(
    flexq.LayerConfig(scheme="channel", act_bits=8),
    {"lm_head": flexq.LayerConfig(scheme="channel", act_bits=8, weight_bits=8)},
)
on_gpu = pytest.mark.skipif(not GPUS, reason="no CUDA device that FlexQ can use")


def prompt_of(tokens: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt_of(tokens, seed) for seed, tokens in enumerate((1, 5, 17, 130))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Llama in floating point, with heads as FlashAttention has them."""
    folder = tmp_path_factory.mktemp("tiny") / "float"
    random_model("llama", VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def best(tiny) -> Path:
    return quantized(tiny, "best", BEST)


@pytest.fixture(scope="module")
def mixed(tiny) -> Path:
    return quantized(tiny, "mixed", MIXED)


def quantized(source: Path, name: str, plan: flexq.Plan) -> Path:
    folder = source.parent / name
    flexq.quantize_checkpoint(source, folder, plan)
    return folder


def start(folder: Path, **options):
    return engine(folder, skip_tokenizer_init=True, **options)


def generate(folder: Path, prompts=PROMPTS, **options):
    """What an engine of its own generates."""
    llm = start(folder, **options)
    try:
        return greedy(llm, prompts)
    finally:
        shut(llm)


def places_fused(worker) -> tuple[int, int]:
    """Norms and products, in the process that compiled."""
    from vllm.compilation.passes.vllm_inductor_pass import get_match_table

    return tuple(get_match_table().get(f"flexq_{kind}", 0) for kind in ("norms", "products"))


@pytest.fixture
def compiling(monkeypatch, own_process):
    """Compiles anew, as what is cached passes no pass; workers can be asked about it, and know of nothing else."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def compiled(folder: Path, prompts=PROMPTS, **options):
    """What a compiled engine generates, and what is fused in its graphs."""
    llm = start(folder, enforce_eager=False, **options)
    try:
        return greedy(llm, prompts), llm.collective_rpc(places_fused)[0]
    finally:
        shut(llm)


def test_compiled(best, compiling, monkeypatch):
    results, fused = compiled(best)
    assert_same(best, PROMPTS, results)
    if not GPUS:  # which vLLM compiles in its own way
        assert fused == (0, 0)
        return
    norms, products = fused
    assert norms == 2 * products > 0  # two norms and a product in a layer
    monkeypatch.setenv("FLEXQ_FUSE", "0")
    unfused, nothing = compiled(best)
    assert nothing == (0, 0)
    assert_same(best, PROMPTS, unfused)
    assert_alike(results, unfused)


@on_gpu
def test_compiled_with_a_mixed_plan(mixed, compiling):
    """Linears whose parts differ stay apart from their norms: all but one, of the second layer's gate and up."""
    results, fused = compiled(mixed)
    assert_same(mixed, PROMPTS, results)
    assert fused == (1, 2)


def test_smollm(smollm_package, tmp_path, compiling):
    """A trained model, whose head is quantized though its embedding is the same tensor."""
    plan, folder = tmp_path / "best.json", tmp_path / "model"
    BEST.save(plan)
    assert main(["quantize", "smollm2-135m", "-o", str(folder), "--plan", str(plan), "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ("The capital of France is", "Once upon a time, in a village by the sea, there lived")
    prompts = [tokenizer(text).input_ids for text in texts]
    if not GPUS:
        assert_same(folder, prompts, generate(folder, prompts))
        return
    results, (norms, products) = compiled(folder, prompts)
    assert_same(folder, prompts, results)
    assert norms == 2 * products > 0


@pytest.fixture(scope="module")
def serving(best):
    """An engine that splits prompts into chunks of 64 tokens and keeps their KV caches."""
    llm = start(best, max_num_batched_tokens=64, max_num_seqs=16, enable_chunked_prefill=True)
    yield llm
    shut(llm)


def test_chunked_prefill(serving, best):
    prompts = [prompt_of(tokens, 20 + tokens) for tokens in (300, 65, 64, 3)]
    assert_same(best, prompts, greedy(serving, prompts))


def test_prefixes_are_cached(serving, best):
    shared = prompt_of(256, 30)
    first, again = shared + prompt_of(5, 31), shared + prompt_of(9, 32)
    assert_same(best, [first], greedy(serving, [first]))
    results = greedy(serving, [again])
    assert_same(best, [again], results)
    (output,) = serving.generate([{"prompt_token_ids": first}], use_tqdm=False)
    assert output.num_cached_tokens >= 128


def test_speculation_with_ngrams(best, own_process):  # numba, which it imports, breaks the next engine's start
    prompts = [prompt_of(6, 40) * 8, prompt_of(3, 41) * 20]
    options = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = start(best, speculative_config=options, disable_log_stats=False)
    try:
        assert_same(best, prompts, greedy(llm, prompts, tokens=32))
        drafts = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens"]
        assert sum(drafts) > 0
    finally:
        shut(llm)


def test_speculation_with_the_layer_of_the_model(tmp_path, monkeypatch, own_process):
    """GLM-4.5's layer that predicts a token more (MTP), which transformers ignores, drafts in floating point."""
    from transformers import Glm4MoeForCausalLM

    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\."])
    model = random_model(
        "glm4_moe", VOCABULARY, moe_intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "float")
    tensors, last, size = load_file(tmp_path / "float" / "model.safetensors"), "model.layers.2.", 256
    tensors |= {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    tensors |= {f"{last}{norm}.weight": torch.ones(size) for norm in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{last}eh_proj.weight"] = torch.randn(size, 2 * size) / size
    tensors[f"{last}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{last}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    plan = flexq.Plan(BEST.defaults, BEST.layers, embeddings=8)
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", plan)
    llm = start(
        tmp_path / "quantized",
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        disable_log_stats=False,
    )
    try:
        assert_same(tmp_path / "quantized", PROMPTS, greedy(llm, PROMPTS), strays=2 if GPUS else 0)
        drafts = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens"]
        assert sum(drafts) > 0
    finally:
        shut(llm)


RANK, ALPHA = 8, 16
ADAPTED = ("q_proj", "v_proj", "gate_proj", "down_proj")


@pytest.fixture(scope="module")
def adapter(tiny) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA adapter's folder as PEFT writes it, and its tensors."""
    config = json.loads((tiny / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"q_proj": (hidden, hidden), "v_proj": (hidden // 2, hidden), "gate_proj": (inner, hidden),
              "down_proj": (hidden, inner)}  # fmt: skip
    generator, tensors = torch.Generator().manual_seed(50), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (n, k) in shapes.items():
            parent = "self_attn" if name in ("q_proj", "v_proj") else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{parent}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, k, generator=generator) / k**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, RANK, generator=generator) / 4
    folder = tiny.parent / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
                "target_modules": list(ADAPTED), "base_model_name_or_path": str(tiny)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, tensors


def adapted(folder: Path, tensors: dict[str, torch.Tensor]):
    """The checkpoint's model in transformers, with an adapter's products added to its linears."""
    model = flexq.load_model(folder, dtype=torch.float32, device=DEVICE)
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            change = (ALPHA / RANK * up @ down).to(DEVICE)
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.register_forward_hook(lambda _, args, y, change=change: y + args[0] @ change.T)
    return model


def test_lora(best, adapter):
    """On quantized layers, beside requests without it."""
    folder, tensors = adapter
    request = LoRARequest("adapter", 1, str(folder))
    llm = start(best, enable_lora=True, max_lora_rank=RANK, max_loras=1)
    try:
        results, plain = greedy(llm, PROMPTS, lora_request=request), greedy(llm, PROMPTS)
    finally:
        shut(llm)
    assert_same_as(adapted(best, tensors), PROMPTS, results)
    assert_same(best, PROMPTS, plain)
    assert [tokens for tokens, _ in results] != [tokens for tokens, _ in plain]


@on_gpu
def test_kv_cache_in_fp8(best):
    model = flexq.load_model(best, dtype=torch.float32, device=DEVICE)
    assert_same_as(model, PROMPTS, generate(best, kv_cache_dtype="fp8"), mean=0.5, near=2.0)


@on_gpu
def test_sleeps_and_wakes(best):
    llm = start(best, enable_sleep_mode=True)
    try:
        before = greedy(llm, PROMPTS)
        free = torch.cuda.mem_get_info()[0]
        llm.sleep(level=1)
        assert torch.cuda.mem_get_info()[0] > free
        llm.wake_up()
        after = greedy(llm, PROMPTS)
    finally:
        shut(llm)
    assert_same(best, PROMPTS, after)
    assert_alike(after, before)


def test_sharded_state(mixed, tmp_path):
    """What each device holds, written and read again."""
    llm = start(mixed)
    try:
        expected = greedy(llm, PROMPTS)
        save_sharded_state(llm, mixed, tmp_path)
    finally:
        shut(llm)
    results = generate(tmp_path, load_format="sharded_state")
    assert_same(mixed, PROMPTS, results)
    assert_alike(results, expected)


@on_gpu
@pytest.mark.parametrize("scheme", ["group", "channel"])
def test_experts(tmp_path, scheme):
    settings = {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
    random_model("qwen3_moe", VOCABULARY, **settings).save_pretrained(tmp_path / "float")
    folder = quantized(tmp_path / "float", "model", flexq.Plan(flexq.LayerConfig(scheme=scheme)))
    # Where two experts are about equally likely, 16 bits take another.
    assert_same(folder, PROMPTS, generate(folder), strays=2)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_two_gpus(best, mixed, compiling):
    results, (_, products) = compiled(best, tensor_parallel_size=2)
    assert_same(best, PROMPTS, results)
    assert products > 0  # norms may be fused with the all-reduce instead
    assert_same(mixed, PROMPTS, generate(mixed, tensor_parallel_size=2))
