"""Tensors of a source that its model's class has no place for: those that are copied, and those that are not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexq.checkpoint.keys import Target, is_ignored, targets_of
from flexq.checkpoint.source import ModelError, ModelSource, Weights, load_config, skeleton


@dataclass
class Placeless:
    """Tensors that the model's class has no place for.

    Args:
        beside: file and name of those that the class says it ignores, as other programs read them: layers that predict
            several tokens (MTP), with which vLLM drafts. They are copied, in floating point.
        left_out: names of the others.
    """

    beside: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model, tensors: Iterable[tuple[Path, str]], targets: Mapping[str, Target | None]) -> "Placeless":
        """Of a model in floating point, its files' tensors, and where each of them goes."""
        found = cls()
        for file, name in tensors:
            if targets[name] is None:
                if is_ignored(model, name):
                    found.beside.append((file, name))
                else:
                    found.left_out.append(name)
        return found

    @classmethod
    def in_source(cls, source: ModelSource) -> "Placeless":
        """Of a folder of safetensors; none of what is loaded otherwise."""
        if source.folder is None:
            return cls()
        try:
            tensors = list(Weights.of(source.folder).tensors())
        except ModelError:
            return cls()  # weights in other files
        model = skeleton(source, load_config(source))
        return cls.of(model, tensors, targets_of(model, [name for _, name in tensors]))
