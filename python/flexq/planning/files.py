"""Rankings of layers as JSON files, which say what they hold and in which version."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

L = TypeVar("L")  # a dataclass of a layer's figures: text, numbers, and numbers by weight bits


@dataclass(frozen=True)
class RankingFile(Generic[L]):
    """A kind of file.

    Args:
        name: that the file calls its format.
        version: of it.
        layer: the dataclass of its entries.
        what: it holds, for messages.
    """

    name: str
    version: int
    layer: type[L]
    what: str

    def save(self, ranking: Sequence[L], path: str | Path, **about: Any) -> None:
        """With what the figures are about: model, text, device."""
        layers = [asdict(layer) for layer in ranking]
        data = {"format": self.name, "version": self.version, **about, "layers": layers}
        Path(path).write_text(json.dumps(data, indent=2) + "\n")

    def load(self, path: str | Path) -> list[L]:
        """ValueError for a file that `save` did not write."""
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != self.name or data["version"] != self.version:
                raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
            return [self.layer(**{key: _by_width(value) for key, value in layer.items()}) for layer in data["layers"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of this version's {self.what}: {error}") from None


def _by_width(value: Any) -> Any:
    """JSON has text for the keys of what is by weight bits."""
    return {int(bits): each for bits, each in value.items()} if isinstance(value, dict) else value
