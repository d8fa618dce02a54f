"""`LLM.generate` against transformers on the same checkpoint; tensor parallelism; quantizing on the way."""

import gc

import flexq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "2 + 2 =",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Water boils at",
    "def fibonacci(n):\n",
]
# Of log probabilities. Where a float is rounded otherwise, an activation takes the next of its codes: that changes
# SmolLM2's at W6A8 by 0.03 in the mean of a prompt and by 0.11 at most. (At W6A6 by 0.17 and by 0.96.)
MEAN, NEAR = 0.1, 0.4


def engine(folder, **options) -> LLM:
    return LLM(str(folder), enforce_eager=True, max_model_len=512, dtype="float32", disable_log_stats=True, **options)


def greedy(llm: LLM, prompts, tokens=16) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log probabilities."""
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True))
    return [
        (list(c.token_ids), [step[t].logprob for t, step in zip(c.token_ids, c.logprobs, strict=True)])
        for c in (o.outputs[0] for o in outputs)
    ]


def assert_same_as_transformers(folder, results, prompts) -> None:
    assert_same(flexq.load_model(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder), results, prompts)


def assert_same(model, tokenizer, results, prompts) -> None:
    """Each token that vLLM chose has the log probability that transformers gives it, and is its choice too, unless
    another is as likely."""
    for prompt, (tokens, logprobs) in zip(prompts, results, strict=True):
        ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)
        ours = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
        difference = (ours - torch.tensor(logprobs)).abs()
        assert difference.mean() < MEAN and difference.max() < NEAR
        assert (expected.max(-1).values - ours).max() < NEAR


def shut(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def test_smollm_as_in_transformers(smollm):
    llm = engine(smollm)
    try:
        together = greedy(llm, PROMPTS)
        alone = [greedy(llm, [prompt])[0] for prompt in PROMPTS[:2]]
        assert_same_as_transformers(smollm, together, PROMPTS)
        assert_same_as_transformers(smollm, alone, PROMPTS[:2])
        # More prompts than fit in a batch, of many lengths: continuous batching.
        many = [" ".join(["word"] * (1 + 7 * i % 60)) for i in range(40)]
        assert [len(tokens) for tokens, _ in greedy(llm, many, 5)] == [5] * 40
    finally:
        shut(llm)


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallel_and_mixed_plans(random_mixed, size, monkeypatch):
    if size > 1:  # vLLM wants a NUMA node for each rank unless it is told their cores
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(size)))
    llm = engine(random_mixed, tensor_parallel_size=size)
    try:
        assert_same_as_transformers(random_mixed, greedy(llm, PROMPTS), PROMPTS)
    finally:
        shut(llm)


def random_model(kind: str, vocabulary: int, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["phi3", "qwen3", "mixtral"])
def test_architectures(random_float, tmp_path, kind):
    """Layers that are merged on disk already, norms of queries and keys, and experts in floating point."""
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    skip = ["*.experts"] if kind == "mixtral" else ()
    model = flexq.quantize_model(random_model(kind, len(tokenizer)), "w6a8", skip=skip)
    flexq.save_model(model, tmp_path / "model", tokenizer)
    llm = engine(tmp_path / "model")
    try:
        assert_same_as_transformers(tmp_path / "model", greedy(llm, PROMPTS[:3]), PROMPTS[:3])
    finally:
        shut(llm)


def test_quantizes_a_float_checkpoint(random_float, tmp_path):
    llm = engine(random_float, quantization="flexq")
    try:
        results = greedy(llm, PROMPTS)
    finally:
        shut(llm)
    flexq.quantize_checkpoint(random_float, tmp_path / "w6a8", "w6a8")
    assert_same_as_transformers(tmp_path / "w6a8", results, PROMPTS)


@pytest.fixture(scope="module")
def mixtures(random_float, tmp_path_factory):
    """Folders of random mixture-of-experts models, in floating point, by kind."""
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    settings = {"mixtral": {}, "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}}
    folders = {}
    for kind, values in settings.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        random_model(kind, len(tokenizer), **values).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def use_cores(size: int, monkeypatch) -> None:
    if size > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(size)))


@pytest.mark.parametrize(("kind", "size"), [("mixtral", 1), ("qwen3_moe", 2)])
def test_quantizes_experts_on_the_way(mixtures, tmp_path, kind, size, monkeypatch):
    """Each device quantizes its part of each expert."""
    use_cores(size, monkeypatch)
    llm = engine(mixtures[kind], quantization="flexq", tensor_parallel_size=size)
    try:
        results = greedy(llm, PROMPTS[:3])
    finally:
        shut(llm)
    flexq.quantize_checkpoint(mixtures[kind], tmp_path / "w6a8", "w6a8")
    assert_same_as_transformers(tmp_path / "w6a8", results, PROMPTS[:3])


@pytest.mark.parametrize(
    ("kind", "scheme", "size", "by_expert"),
    [
        ("mixtral", "group", 1, False),
        ("qwen3_moe", "group", 2, False),
        ("mixtral", "channel", 1, False),
        ("qwen3_moe", "group", 2, True),
    ],
)
def test_serves_quantized_experts(mixtures, tmp_path, kind, scheme, size, by_expert, monkeypatch):
    """A checkpoint's experts: all here, each device a part of each, or each device some of them."""
    use_cores(size, monkeypatch)
    plan = flexq.Plan(flexq.LayerConfig(scheme=scheme))
    flexq.quantize_checkpoint(mixtures[kind], tmp_path / "model", plan)
    llm = engine(tmp_path / "model", tensor_parallel_size=size, enable_expert_parallel=by_expert)
    try:
        results = greedy(llm, PROMPTS[:3])
    finally:
        shut(llm)
    assert_same_as_transformers(tmp_path / "model", results, PROMPTS[:3])


def test_merged_layers_share_a_width():
    """vLLM has one tensor for q, k and v."""
    from flexq.integrations.vllm import FlexQVllmConfig
    from vllm.model_executor.layers.linear import LinearBase

    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    plan = flexq.Plan(layers={name: flexq.LayerConfig(weight_bits=b) for name, b in zip(names, (6, 5, 6), strict=True)})
    config = FlexQVllmConfig(plan)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = LinearBase.__new__(LinearBase)
    with pytest.raises(ValueError, match="it gives group 6 bits, group 5 bits, group 6 bits"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
