"""Names of layers: what vLLM's classes call them, and what a checkpoint does."""

import re
from collections.abc import Iterable

# What classes merge that do not say so in packed_modules_mapping (StableLM, GPT-J; BERT).
MERGED = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}
_HEADS = ("lm_head", "embed_out")
# Layers that choose experts stay in floating point, and what is in them (Granite's, Hunyuan's).
_ROUTERS = re.compile(r"(^|\.)(gate|[^.]*router[^.]*)(\.[^.]+)?$")
# So do the parts beside a language model: names that are or contain one of these.
_ENCODERS = re.compile(
    r"(^|\.)([^.]*(vision|visual|image|audio|speech|multi_modal|multimodal)[^.]*|vpm|apm|resampler|connector)(\.|$)"
)


def is_head(name: str) -> bool:
    return name.rpartition(".")[2] in _HEADS


def stays_anyway(name: str) -> bool:
    """Whether a layer is left in floating point on the way, so that a plan that says so need not find it."""
    last = name.rpartition(".")[2]
    return last == "lm_head" or _ROUTERS.search(name) is not None or _ENCODERS.search(name) is not None


def block_of(name: str) -> str | None:
    """The block that a layer is in, as `model.layers.3`; None outside of all."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match and match[0]


def name_by(mapper, name: str) -> str:
    """vLLM's name of a checkpoint's layer, by a class's mapper: of itself, or, as mappers of LM heads have it, of what
    is in it."""
    for suffix in ("", ".weight"):
        new = (mapper.apply_list([name + suffix]) or [name + suffix])[0]
        if new != name + suffix:
            return new.removesuffix(suffix)
    return name


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Of `names` a layer's own, where its class tells another: BERT's queries are `attention.output.query` then,
    Granite's Mamba is `mixer`, Falcon-H1's attention has no name. Of those that end alike and have the same numbers it
    is the one with the fewest words that only one of both has, four at most. None if that is none or several."""
    words = name.split(".")
    alike: dict[int, list[str]] = {}
    for other in names:
        parts = other.split(".")
        if parts[-1] == words[-1] and _numbers(parts) == _numbers(words):
            alike.setdefault(len(set(parts) ^ set(words)), []).append(other)
    nearest = alike[min(alike)] if alike and min(alike) <= 4 else []
    return nearest[0] if len(nearest) == 1 else None


def _numbers(words: list[str]) -> list[str]:
    return [word for word in words if word.isdigit()]
