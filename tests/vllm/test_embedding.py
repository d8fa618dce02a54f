"""Checkpoints whose token embedding is quantized, in vLLM."""

import flexq
import pytest
from engines import assert_same, engine, greedy, random_model, save_sharded_state, shut
from test_offline import PROMPTS, use_cores
from transformers import AutoTokenizer

PLAN = flexq.Plan.uniform(embeddings=8)


@pytest.mark.parametrize(
    ("kind", "size", "kept"),
    [
        ("llama", 1, True),  # whose class gives the embedding no name
        ("qwen3", 2, True),
        ("mixtral", 1, False),  # whose class asks no method for it
    ],
)
def test_serves_it(random_float, tmp_path, kind, size, kept, monkeypatch):
    use_cores(size, monkeypatch)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    skip = ["*.experts"] if kind == "mixtral" else ()
    model = flexq.quantize_model(random_model(kind, len(tokenizer)), PLAN, skip=skip)
    flexq.save_model(model, tmp_path / "model", tokenizer)
    llm = engine(tmp_path / "model", tensor_parallel_size=size)
    try:
        results = greedy(llm, PROMPTS[:3])
        assert llm.apply_model(_is_quantized) == [kept] * size
    finally:
        shut(llm)
    assert_same(tmp_path / "model", [tokenizer(prompt).input_ids for prompt in PROMPTS[:3]], results)


def test_sharded_state(random_float, tmp_path):
    """What each device holds, written and read again."""
    tokenizer = AutoTokenizer.from_pretrained(random_float)
    folder, state = tmp_path / "model", tmp_path / "state"
    state.mkdir()
    flexq.save_model(flexq.quantize_model(random_model("llama", len(tokenizer)), PLAN), folder, tokenizer)
    llm = engine(folder)
    try:
        expected = greedy(llm, PROMPTS[:2])
        save_sharded_state(llm, folder, state)
    finally:
        shut(llm)
    llm = engine(state, load_format="sharded_state")
    try:
        assert greedy(llm, PROMPTS[:2]) == expected
    finally:
        shut(llm)


def _is_quantized(model) -> bool:
    return hasattr(model.model.embed_tokens, "weight_packed")


def test_is_not_quantized_on_the_way(monkeypatch, tmp_path):
    from flexq.integrations.vllm import FlexQVllmConfig

    PLAN.save(tmp_path / "plan.json")
    monkeypatch.setenv("FLEXQ_PLAN", str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="serve what `flexq quantize --embeddings` writes"):
        FlexQVllmConfig()


def test_whose_it_is():
    """The embedding's is the name outside of blocks that no other layer has."""
    from flexq.embedding import CONFIG
    from flexq.integrations.vllm import FlexQVllmConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers = {"model.embed_tokens": CONFIG, "lm_head": CONFIG, "model.layers.0.mlp.up_proj": CONFIG}
    embedding, head = (kind.__new__(kind) for kind in (VocabParallelEmbedding, ParallelLMHead))
    named = FlexQVllmConfig(flexq.Plan(layers=layers, embeddings=8))
    assert named.get_quant_method(embedding, "model.embed_tokens").name == "model.embed_tokens"
    assert named.get_quant_method(head, "lm_head") is not None and named.embeddings_without_place() == set()
    other = FlexQVllmConfig(flexq.Plan(layers=layers, embeddings=8))
    assert other.get_quant_method(embedding, "model.embed_positions") is None
    assert other.get_quant_method(head, "lm_head") is not None
    assert other.embeddings_without_place() == {"model.embed_tokens"}
    plain = FlexQVllmConfig(flexq.Plan(layers=layers))
    assert plain.get_quant_method(embedding, "model.embed_tokens") is None
