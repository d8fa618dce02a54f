"""Which tensor of a checkpoint is which of a model, and what is missing, too much, or of another shape.

Names on disk are not always those of modules: transformers renames, merges and splits tensors while it loads them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexq.checkpoint.source import CheckpointError, one_line, opened
from flexq.quantize.experts import PROJECTIONS


@dataclass(frozen=True)
class Target:
    """Where a checkpoint's tensor goes.

    Args:
        name: in the model's state_dict.
        is_part: transformers merges or splits it on the way.
        pattern: of transformers' converter that does so, which the name on disk matches.
        others: the model's tensors that the converter makes besides.
    """

    name: str
    is_part: bool
    pattern: str | None = None
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of the model's tensors that it goes to."""
        return (self.name, *self.others)


def targets_of(model, names: Iterable[str]) -> dict[str, Target | None]:
    """Where transformers puts each of a checkpoint's tensors; None for one that the model has no place for.

    Args:
        model: of transformers, on any device; quantized layers already in their places.
        names: on disk.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions_of(model)
    state, prefix = model.state_dict(), model.base_model_prefix
    made = {p: c.target_patterns for c in converters for p in c.source_patterns}
    result: dict[str, Target | None] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if renamed not in state and pattern is None:
            result[name] = None
            continue
        others = () if pattern is None else _besides(made[pattern], renamed)
        result[name] = Target(renamed, pattern is not None, pattern, others)
    return result


def _besides(patterns: Sequence[str], name: str) -> tuple[str, ...]:
    """Names after the first of what a converter makes, by its patterns and the first name."""
    return tuple(name.replace(patterns[0], other, 1) for other in patterns[1:])


def split_with(conversions: Iterable[Any], name: str) -> list[str]:
    """The model's tensors that transformers makes besides one of this name, which is the first of them."""
    splitting = [c.target_patterns for c in conversions if _splits(c) and c.target_patterns[0] in name]
    return [other for patterns in splitting for other in _besides(patterns, name)]


def _conversions_of(model) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters of the tensors of a model's files, quantized or not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = read_quantized_whole(get_model_conversion_mapping(model))
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    return renamings, [c for c in conversions if isinstance(c, WeightConverter)]


def remember_conversions(model, names: Iterable[str]) -> None:
    """Have transformers name and part the model's tensors on disk as in the files that have these names, as it does
    for models that it loads itself."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions_of(model)
    state = model.state_dict()
    for name in names:
        rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    model._weight_conversions = [c for c in (*renamings, *converters) if c.was_used()]


def dtype_of(model, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which transformers loads a tensor of the model's state_dict: `dtype`, unless the model's class keeps
    it in float32."""
    kept = model._get_dtype_plan(dtype)
    return torch.float32 if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept) else dtype


def made_of(model, target: Target, parts: Iterable[tuple[str, Callable[[], torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The tensors that transformers makes of one or several, by their names in the model's state_dict.

    Args:
        model: whose tensors they are.
        target: of one of the parts.
        parts: the name of each on disk, and what reads it.

    Raises:
        CheckpointError: they do not fit together.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _conversions_of(model)
    converter = copy.deepcopy(next(c for c in converters if target.pattern in c.source_patterns))
    state = model.state_dict()
    for name, read in sorted(parts, key=lambda part: dot_natural_key(part[0])):
        _, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        converter.add_tensor(target.name, name, pattern, read)
    try:
        made = converter.convert(target.name, model=model, config=model.config)
        return {name: made[name][0] if isinstance(made[name], list) else made[name] for name in target.names}
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"tensor {target.name} cannot be made of its parts: {one_line(error)}") from None


# ---- Quantized layers in files ---------------------------------------------------------------------------------------

# After a name: it ends here; and: no tensor of a quantized layer begins here.
_ENDS = r"(?![\w.])"
_NOT_QUANTIZED = r"(?!\w|\.qweight|\.scales)"


def kept_names(model, layers: Mapping[str, str]) -> set[str]:
    """Of layers by their names on disk, those whose quantized tensors transformers finds under that name too: a rule
    for `<name>.weight` alone does not do for `<name>.qweight`.

    Args:
        model: whose layers they are.
        layers: by their names on disk, their names in the model.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions_of(model)
    prefix = f"{model.base_model_prefix}."

    def goes_to(name: str) -> str:
        return rename_source_key(f"{name}.qweight", renamings, converters)[0].removesuffix(".qweight")

    return {name for name, layer in layers.items() if goes_to(name).removeprefix(prefix) == layer.removeprefix(prefix)}


def keep_quantized_whole(model) -> None:
    """Have transformers leave the tensors of quantized layers as they are when it saves the model.

    What it knows of a layer's weight, that files have it in parts, merged with others, permuted or under another name,
    it would apply to `qweight` and `scales` too. What it splits on loading it does not merge again where some of the
    parts are quantized.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    if not isinstance(model, PreTrainedModel):
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # what transformers itself would take
        every = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in every if not isinstance(c, PrefixChange)]
    layers = [f"{name}.weight" for name, m in model.named_modules() if getattr(m, "is_flexq_layer", False)]
    model._weight_conversions = [_for_quantized(c) for c in conversions if not (_splits(c) and _merges(c, layers))]


def read_quantized_whole(conversions: list) -> list:
    """The same when a checkpoint is loaded whose layers are quantized: what transformers does to
    `experts.gate_up_proj` (Qwen3-VL-MoE's is transposed) is not for the tensors below that name."""
    return [_for_quantized(c, on_load=True) for c in conversions]


def _splits(conversion) -> bool:
    """Whether it makes several tensors of those that it reads."""
    return hasattr(conversion, "operations") and len(conversion._original_target_patterns) > 1


def _merges(conversion, tensors: Iterable[str]) -> bool:
    """Whether it makes one tensor of these and others when a model is saved."""
    back = conversion.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in tensors)


def _for_quantized(conversion, on_load: bool = False):
    """A conversion of transformers that passes by the tensors of quantized layers, but for their renamed modules."""
    sources, targets = list(conversion._original_source_patterns), list(conversion._original_target_patterns)
    read = sources if on_load else targets  # what names are compared with
    if hasattr(conversion, "operations"):
        ended = [_ended(p, _ENDS if p.endswith(PROJECTIONS) else _NOT_QUANTIZED) for p in read]
    elif len(sources) == len(targets) == 1:
        # Of experts, or a weight that files have under the name of its module.
        whole_name = (on_load and targets[0].endswith(".weight")) or (
            "experts" in read[0] and read[0].endswith(PROJECTIONS)
        )
        ended = [_ended(read[0], _ENDS)] if whole_name else read
    else:
        return conversion
    if ended == read:
        return conversion
    settings = {n: getattr(conversion, n) for n in ("operations", "force_cpu", "offset") if hasattr(conversion, n)}
    whole = type(conversion)(*((ended, targets) if on_load else (sources, ended)), **settings)
    for name in ("scope_prefix", "base_model_prefix"):  # of later versions
        if hasattr(conversion, name):
            setattr(whole, name, getattr(conversion, name))
    return whole


def _ended(pattern: str, end: str) -> str:
    """A pattern that matches only where `end` follows; as it is where it ends by an assertion of its own."""
    return pattern + end if re.search(r"\w$", pattern) else pattern


@dataclass
class Differences:
    """What does not fit between a checkpoint and a model, by names of tensors.

    Args:
        missing: the model has, the checkpoint does not.
        unexpected: the other way round.
        mismatched: name to the shapes (checkpoint's, model's).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def require_none(self, what: str) -> None:
        """CheckpointError in one line if there are any."""
        if self.mismatched:
            name, (given, expected) = next(iter(self.mismatched.items()))
            more = _more(len(self.mismatched))
            raise CheckpointError(f"{what}: tensor {name} is {list(given)}, the model's {list(expected)}{more}")
        for names, problem in ((self.missing, "is missing"), (self.unexpected, "has no place in the model")):
            if names:
                raise CheckpointError(f"{what}: tensor {names[0]} {problem}{_more(len(names))}")


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def shapes_of(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in safetensors files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened(Path(file)) as handle:
            for name in handle.keys():  # noqa: SIM118
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def compare(model, shapes: Mapping[str, tuple[int, ...]]) -> Differences:
    """A checkpoint's tensors against a model's, before either is in memory.

    A model of the class that the checkpoint is of must be given all of its tensors, and no others. One of another class
    (the base model without its head, or with a new head) may differ outside the base model.
    """
    result = Differences()
    state = model.state_dict()
    targets = targets_of(model, shapes)
    result.unexpected = [name for name, target in targets.items() if target is None]
    found = [(name, target) for name, target in targets.items() if target is not None]
    for name, target in found:
        expected = state.get(target.name)
        if not target.is_part and expected is not None and tuple(expected.shape) != shapes[name]:
            result.mismatched[name] = (shapes[name], tuple(expected.shape))
    filled = {name for _, target in found for name in target.names}
    result.missing = [name for name in state if name not in filled]
    tied = _tied_to(model, filled)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    result.missing = [n for n in result.missing if n not in tied and not _matches(n, ignored)]
    result.unexpected = [n for n in result.unexpected if not is_ignored(model, n)]
    if not is_own_class(model):
        _forgive_heads(model, result)
    return result


def _tied_to(model, filled: set[str]) -> set[str]:
    """Tensors that are tied to others which are given: transformers ties either way."""
    groups: dict[str, set[str]] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, {source}).add(name)
    return {name for group in groups.values() if not group.isdisjoint(filled) for name in group}


def is_own_class(model) -> bool:
    """Whether a model is of the class that its checkpoint was written from."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or [type(model).__name__])


def is_ignored(model, name: str) -> bool:
    """Whether the model's class says that files may have this tensor, which it does not use: layers that predict
    several tokens (MTP) among them, which vLLM drafts with."""
    return _matches(name, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _forgive_heads(model, differences: Differences) -> None:
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:  # the checkpoint's head has no place
        differences.unexpected = [n for n in differences.unexpected if n.startswith(prefix)]
    else:  # another head than the checkpoint's, which begins at random, as transformers says
        differences.missing = [n for n in differences.missing if n.startswith(prefix)]
        differences.unexpected = [n for n in differences.unexpected if n.startswith(prefix)]
        state = model.state_dict()
        differences.mismatched = {
            n: shapes for n, shapes in differences.mismatched.items() if n.startswith(prefix) or n not in state
        }
