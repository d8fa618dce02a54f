"""Which tensor of a checkpoint is which of a model, and what is missing, too much, or of another shape.

Names on disk are not always those of modules: transformers renames, merges and splits tensors while it loads them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
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
        is_split: the converter makes several of the model's tensors, of which `name` is the first.
    """

    name: str
    is_part: bool
    pattern: str | None = None
    is_split: bool = False


def targets_of(model, names: Iterable[str]) -> dict[str, Target | None]:
    """Where transformers puts each of a checkpoint's tensors; None for one that the model has no place for.

    Args:
        model: of transformers, on any device; quantized layers already in their places.
        names: on disk.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions_of(model)
    state, prefix = model.state_dict(), model.base_model_prefix
    splitting = {p for c in converters if len(c.target_patterns) > 1 for p in c.source_patterns}
    result: dict[str, Target | None] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        found = renamed in state or pattern is not None
        result[name] = Target(renamed, pattern is not None, pattern, pattern in splitting) if found else None
    return result


def _conversions_of(model) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters of the tensors of a model's files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = get_model_conversion_mapping(model)
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


def merged(model, target: Target, parts: Iterable[tuple[str, Callable[[], torch.Tensor]]]) -> torch.Tensor:
    """The tensor that transformers makes of several.

    Args:
        model: whose tensor it is.
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
        made = converter.convert(target.name, model=model, config=model.config)[target.name]
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"tensor {target.name} cannot be made of its parts: {one_line(error)}") from None
    return made[0] if isinstance(made, list) else made


# After a name: it ends here.
_ENDS = r"(?![\w.])"


def keep_experts_whole(model) -> None:
    """Have transformers leave the tensors of quantized experts as they are when it saves the model.

    What it knows of `experts.gate_up_proj`, that it is stored expert by expert or under another name, it would apply to
    `experts.gate_up_proj.qweight` too.
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
    model._weight_conversions = [_whole_names_only(c) for c in conversions]


def read_experts_whole(conversions: list) -> list:
    """The same when a checkpoint is loaded whose experts are quantized: what transformers does to
    `experts.gate_up_proj` (Qwen3-VL-MoE's is transposed) is not for the tensors below that name."""
    return [_whole_names_only(c, on_load=True) for c in conversions]


def _whole_names_only(conversion, on_load: bool = False):
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    read = sources if on_load else targets  # what names are compared with
    if not any("experts" in p and p.endswith(PROJECTIONS) for p in read):
        return conversion
    ended = [p + _ENDS if p.endswith(PROJECTIONS) else p for p in read]
    settings = {n: getattr(conversion, n) for n in ("operations", "force_cpu") if hasattr(conversion, n)}
    patterns = (ended, list(targets)) if on_load else (list(sources), ended)
    whole = type(conversion)(*patterns, **settings)
    for name in ("scope_prefix", "base_model_prefix"):  # of later versions
        if hasattr(conversion, name):
            setattr(whole, name, getattr(conversion, name))
    return whole


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
    filled = {target.name for _, target in found}
    parts = {_module_of(target.name) for _, target in found if target.is_part}  # with more targets than are named
    result.missing = [name for name in state if name not in filled and _module_of(name) not in parts]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    result.missing = [n for n in result.missing if n not in tied and not _matches(n, ignored)]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    result.unexpected = [n for n in result.unexpected if not _matches(n, ignored)]
    if not is_own_class(model):
        _forgive_heads(model, result)
    return result


def is_own_class(model) -> bool:
    """Whether a model is of the class that its checkpoint was written from."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or [type(model).__name__])


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


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
