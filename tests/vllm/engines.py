"""Engines of vLLM on the GPU, or on the CPU where there is none, and the reference for what they generate."""

import gc
import shutil
from pathlib import Path

import flexq
import torch
from flexq.execution import resolve_device
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams

DEVICE = resolve_device("auto")
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 0
DTYPE = "bfloat16" if GPUS else "float32"
# Of log probabilities. Where a float is rounded otherwise, an activation takes the next of its codes: that changes
# SmolLM2's at W6A8 by 0.03 in the mean of a prompt and by 0.11 at most. (At W6A6 by 0.17 and by 0.96.) In 16 bits that
# happens everywhere: random models' change by 0.12 in the mean and by 0.36 at most.
MEAN, NEAR = (0.25, 1.0) if GPUS else (0.1, 0.4)


def engine(folder: Path, **options) -> LLM:
    """An engine in eager mode, unless `options` say otherwise; several fit on a GPU."""
    defaults = {"enforce_eager": True, "max_model_len": 512, "dtype": DTYPE, "disable_log_stats": True}
    if GPUS:
        # vLLM would measure how much memory its start takes, which other programs on the GPU change meanwhile.
        defaults |= {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 1 << 28}
    return LLM(str(folder), **(defaults | options))


def greedy(llm: LLM, prompts: list, tokens: int = 16, **options) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log probabilities, for prompts of text or of tokens."""
    prompts = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True)
    return [result_of(output) for output in llm.generate(prompts, params, use_tqdm=False, **options)]


def result_of(output) -> tuple[list[int], list[float]]:
    completion = output.outputs[0]
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    return list(completion.token_ids), [step[token].logprob for token, step in steps]


def save_sharded_state(llm: LLM, folder: Path, state: Path) -> None:
    """What each device holds of the checkpoint in `folder`, and the files beside its tensors."""
    llm.llm_engine.engine_core.save_sharded_state(str(state))
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, state)


def shut(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def assert_same(folder: Path, prompts: list[list[int]], results, **options) -> None:
    """What `assert_same_as` does, with the checkpoint's model in transformers."""
    assert_same_as(flexq.load_model(folder, dtype=torch.float32, device=DEVICE), prompts, results, **options)


def assert_same_as(
    model, prompts: list[list[int]], results, mean: float = MEAN, near: float = NEAR, strays: int = 0
) -> None:
    """Each token that vLLM chose has the log probability that `model` gives it, and is its choice too, unless another
    is as likely. In each prompt `strays` tokens may be otherwise, those of which a router has chosen other experts."""
    for prompt, (tokens, logprobs) in zip(prompts, results, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).cpu()
        ours = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
        kept = len(tokens) - strays
        difference = (ours - torch.tensor(logprobs)).abs().sort().values[:kept]
        assert difference.mean() < mean and difference.max() < near
        assert (expected.max(-1).values - ours).sort().values[:kept].max() < near


def assert_alike(results, others) -> None:
    """Two engines chose the same tokens, each until one had to choose between two that are as likely."""
    equal = 0
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(results, others, strict=True):
        pairs = enumerate(zip(tokens, other_tokens, strict=True))
        same = next((i for i, (a, b) in pairs if a != b), len(tokens))
        equal += same
        differences = torch.tensor(logprobs[: same + 1]) - torch.tensor(other_logprobs[: same + 1])
        assert differences.abs().max() < NEAR
    assert equal >= sum(len(tokens) for tokens, _ in results) / 4  # models that differ have a few in common at most


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
