"""Small random models of every kind that the docs name, made from configurations alone.

python tests/python/architectures.py     # writes docs/reference/models.md from what the models do
"""

import contextlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What some classes call the same, and experts, which are many by default.
OTHER_NAMES = {
    "n_embd": 128, "n_layer": 2, "n_head": 4, "n_layers": 2, "head_dim": 32, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "d_model": 128, "d_ff": 256, "d_kv": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256, "ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4, "dim": 128, "hidden_dim": 256, "embedding_size": 128,
    "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A kind of model, and what is to be said of it.

    Args:
        kind: transformers' `model_type`.
        family: decoder, encoder, encoder-decoder, vision-language or audio.
        auto: the class of transformers that makes it.
        overrides: of the configuration.
        skip: layers that have to be left in floating point, whose code reads the weight itself.
    """

    kind: str
    family: str = "decoder"
    auto: str = "AutoModelForCausalLM"
    overrides: dict[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.auto.removeprefix('AutoModel').removeprefix('For') or 'base'}"

    def config(self):
        from transformers import AutoConfig

        settings = SHAPE if self.family not in ("vision-language", "audio") else {}
        config = AutoConfig.for_model(self.kind, **(settings | self.overrides))
        for name, value in OTHER_NAMES.items():
            if hasattr(config, name) and name not in self.overrides and self.family != "vision-language":
                with contextlib.suppress(AttributeError):  # a property made of others
                    setattr(config, name, value)
        return config

    def model(self):
        """In float32, its weights large enough to matter."""
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(self.config(), dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if (parameter.dim() == 2 or ".experts." in name) and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.08)
        model.tie_weights()
        return model


_TEXT = SHAPE | {"head_dim": 32}
_T5GEMMA = _TEXT | {"query_pre_attn_scalar": 32, "sliding_window": 32}
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

ARCHITECTURES = (
    *(
        Architecture(kind)
        for kind in (
            "bloom", "cohere", "diffllama", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode",
            "gpt_neox", "granite", "lfm2", "llama", "mistral", "mpt", "nemotron", "olmo2", "olmo3", "openai-gpt", "opt",
            "persimmon",
            "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
        )
    ),
    Architecture("falcon_h1", overrides={
        "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32,
    }),
    Architecture("zamba2", overrides={
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 32, "mamba_d_state": 16, "adapter_rank": 8,
        "chunk_size": 32, "use_mamba_kernels": False, "num_key_value_heads": 4,
    }),
    Architecture("gptj", overrides={"rotary_dim": 16}),
    Architecture("recurrent_gemma", overrides={"num_hidden_layers": 3}),
    Architecture("mamba"),
    *(Architecture(kind) for kind in ("gpt_oss", "granitemoe", "mixtral", "olmoe")),
    Architecture("qwen2_moe", overrides={"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
    Architecture("qwen3_moe", overrides={"moe_intermediate_size": 64}),
    Architecture("deepseek_v3", overrides={
        "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "head_dim": 16,
        "num_key_value_heads": 4,
    }),
    Architecture("glm4_moe", overrides={
        "moe_intermediate_size": 64, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }),
    Architecture("llama4_text", overrides={"intermediate_size_mlp": 256, "interleave_moe_layer_step": 1}),
    Architecture("bert", "encoder", "AutoModel"),
    Architecture("bert", "encoder", "AutoModelForMaskedLM"),
    Architecture("bert", "encoder", "AutoModelForSequenceClassification"),
    Architecture("distilbert", "encoder", "AutoModel"),
    Architecture("roberta", "encoder", "AutoModel"),
    Architecture("albert", "encoder", "AutoModel"),
    Architecture("modernbert", "encoder", "AutoModel"),
    Architecture("nomic_bert", "encoder", "AutoModel"),
    Architecture("llama", "decoder", "AutoModel"),
    Architecture("llama", "decoder", "AutoModelForSequenceClassification"),
    Architecture("llama", "decoder", "AutoModelForQuestionAnswering"),
    Architecture("bart", "encoder-decoder", "AutoModelForSeq2SeqLM"),
    Architecture("t5", "encoder-decoder", "AutoModelForSeq2SeqLM", {"decoder_start_token_id": 0}),
    Architecture("marian", "encoder-decoder", "AutoModelForSeq2SeqLM", {"decoder_start_token_id": 0}),
    *(
        Architecture("t5gemma", "encoder-decoder", auto, {
            "encoder": _T5GEMMA, "decoder": _T5GEMMA, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        })
        for auto in ("AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification")
    ),
    Architecture("whisper", "audio", "AutoModelForSpeechSeq2Seq", {
        "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
    Architecture("llava", "vision-language", "AutoModelForImageTextToText", {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
        "image_token_index": 250, "image_token_id": 250,
    }),
    Architecture("gemma3", "vision-language", "AutoModelForImageTextToText", {
        "text_config": {"model_type": "gemma3_text", **_TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **_VISION}, "mm_tokens_per_image": 4,
        "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
    }),
)  # fmt: skip


def architecture(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.id == name)


def inputs_of(architecture: Architecture, model) -> dict[str, torch.Tensor]:
    """Something to call the model with."""
    ids = torch.arange(3, 27).view(2, 12)
    if architecture.family == "audio":
        features = torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64)
        return {"input_features": features, "decoder_input_ids": ids}
    if architecture.family == "encoder-decoder":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def answer(architecture: Architecture, model) -> torch.Tensor:
    """Logits, or hidden states."""
    from flexq.quantize.inputs import result_of

    with torch.inference_mode():
        return result_of(model(**inputs_of(architecture, model)))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- The page --------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
_HEAD = """# Supported models

What FlexQ does with models of transformers, by architecture. Each row is a small random model that the tests quantize
while it loads, in place and from disk to disk, save, load, fuse, calibrate and compare
(`tests/python/test_architectures.py`; this page is written by `python tests/python/architectures.py`).

- *quantized*: the share of the weights outside embeddings and LM head that is quantized by default, in the small model;
  [experts](../how-to/experts.md) included.
- *merged*: layers with one input become one GEMM in `flexq.fuse_model` (q/k/v, gate/up); *kernels*: norms, SiLU
  products and sums that it fuses with the quantization.
- *calibrated*: block by block, each on what the quantized blocks before it give; or *whole*: all layers on what the
  unquantized model gives.

Others work as far as they are made of linear layers and of experts that are understood; `flexq quantize` and
`flexq info` say which share is quantized. Of models that combine language with vision or audio the language model is
quantized, and layers that project into it; encoders of images and sound stay as they are.

"""


def row(architecture: Architecture) -> list[str]:
    """What the page says of an architecture, found by trying."""
    import flexq
    from flexq.quantize.blocks import stacks_of
    from flexq.quantize.report import coverage

    model = architecture.model()
    try:
        how = "by block" if stacks_of(model) else "whole"
    except ValueError:
        how = "reads no text"
    name = type(model).__name__
    flexq.quantize_model(model, skip=architecture.skip)
    share = f"{100 * coverage(model).share_inside:.0f}%"
    fusion = flexq.fuse_model(model, kernels=True)
    kernels = len(fusion.mlps) + len(fusion.norms) + len(fusion.layers)
    note = ""
    if architecture.skip:
        note = f"needs skip={list(architecture.skip)}: its code reads that weight itself"
    merged = sum(len(names) > 1 for names in fusion.merged)
    return [f"`{name}`", architecture.family, share, "yes" if merged else "-", "yes" if kernels else "-", how, note]


def page() -> str:
    header = ["model", "kind", "quantized", "merged", "kernels", "calibrated", "note"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [header, ["---"] * len(header), *map(row, ARCHITECTURES)]
    return _HEAD + "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(page())
