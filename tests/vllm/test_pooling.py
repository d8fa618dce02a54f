"""Models that give embeddings and classes: FlexQ checkpoints against transformers. Small, random, on the CPU too."""

import flexq
import pytest
import torch
from engines import DEVICE, engine, shut
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from vllm.config import PoolerConfig

PROMPTS = [[1, 17, 45, 30, 9, 2], [1, 40, 33, 2]]
PLAN = flexq.Plan(flexq.LayerConfig(scheme="channel"))
BEST = flexq.Plan(PLAN.defaults, {"lm_head": flexq.LayerConfig(scheme="channel", weight_bits=8)}, embeddings=8)
# Of the class without a head; classes that tell other names than their modules have; a head that is not loaded.
MODELS = {
    "qwen3": ("qwen3", AutoModel, {"head_dim": 64}, PLAN),
    "qwen3-head": ("qwen3", AutoModelForCausalLM, {"head_dim": 64, "tie_word_embeddings": True}, BEST),
    "bert": ("bert", AutoModel, {}, "w6a8"),
    "modernbert": ("modernbert", AutoModel, {"global_attn_every_n_layers": 2, "local_attention": 64}, "w6a8"),
    "roberta-classes": ("roberta", AutoModelForSequenceClassification, {"num_labels": 3}, "w6a8"),
    "gpt2-classes": ("gpt2", AutoModelForSequenceClassification, {"num_labels": 3}, "w6a8"),
}


def saved(folder, tokenizer, kind: str, of: type, **settings) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=514, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2, **settings,
    )  # fmt: skip
    model = of.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_as_in_transformers(random_float, tmp_path, name):
    kind, of, settings, plan = MODELS[name]
    saved(tmp_path / "float", AutoTokenizer.from_pretrained(random_float), kind, of, **settings)
    flexq.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", plan)
    model = flexq.load_model(tmp_path / "quantized", dtype=torch.float32, device=DEVICE)
    assert any(isinstance(module, flexq.Linear) for module in model.modules())
    gives_classes = of is AutoModelForSequenceClassification
    pooler = {} if gives_classes else {"pooler_config": PoolerConfig(task="token_embed")}
    llm = engine(tmp_path / "quantized", runner="pooling", **pooler)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    try:
        if gives_classes:
            found = [torch.tensor(output.outputs.probs) for output in llm.classify(prompts, use_tqdm=False)]
        else:
            outputs = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
            found = [torch.as_tensor(output.outputs.data).float() for output in outputs]
    finally:
        shut(llm)
    for prompt, given in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([prompt], device=model.device), output_hidden_states=True)
        if gives_classes:
            assert (output.logits[0].softmax(-1).cpu() - given).abs().max() < 0.03
        else:
            expected = output.hidden_states[-1][0] if "logits" in output else output.last_hidden_state[0]
            assert torch.cosine_similarity(expected.float().cpu(), given).min() > 0.99
