"""Plans: which layers are quantized, and how. A JSON that a person can edit (docs/format.md)."""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

FORMAT = "flexq-plan"
VERSION = 1
_CHOICES = {
    "act_bits": (6, 8),
    "scheme": ("group", "channel"),
    "rotation": ("none", "hadamard128"),
    "weight_bits": (6,),
}


@dataclass(frozen=True)
class LayerConfig:
    """How one linear layer is quantized.

    Args:
        act_bits: 6 or 8, bits of the activations.
        scheme: "group": a scale per row (token) and 128 inputs; "channel": one per row (token).
        rotation: "hadamard128" rotates each group of 128 before quantization, "none" does not.
        weight_bits: 6.
    """

    act_bits: int = 8
    scheme: str = "group"
    rotation: str = "hadamard128"
    weight_bits: int = 6

    def __post_init__(self):
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or value not in accepted:
                choices = " or ".join(repr(a) for a in accepted)
                raise ValueError(f"{name} must be {choices}, got {value!r}")


def _layer_config(where: str, settings: Any, base: LayerConfig) -> LayerConfig:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must be an object of settings, got {settings!r}")
    known = {f.name for f in fields(LayerConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    try:
        return replace(base, **settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Plan:
    """Settings for the linear layers of a model.

    Args:
        defaults: for every layer that `layers` does not name.
        layers: layer name, or pattern as in `fnmatch` ("*.down_proj"), to its settings, or None to leave it as it is.
            An exact name goes before patterns, an earlier pattern before a later one.
        produced_by: free-form record of how the plan came about.
    """

    defaults: LayerConfig = field(default_factory=LayerConfig)
    layers: dict[str, LayerConfig | None] = field(default_factory=dict)
    produced_by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def uniform(cls, **settings: Any) -> "Plan":
        """The same `LayerConfig` settings for every layer."""
        return cls(_layer_config("plan", settings, LayerConfig()), produced_by={"recipe": "uniform"})

    @classmethod
    def named(cls, name: str) -> "Plan":
        """A built-in recipe, see `RECIPES`."""
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; built in are {', '.join(RECIPES)}")
        return RECIPES[name]

    @classmethod
    def of(cls, plan: "Plan | str | Path | Mapping[str, Any]") -> "Plan":
        """A Plan, the name of a recipe, a path to a JSON file, or such a JSON's object."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Mapping):
            return cls.from_dict(plan)
        if str(plan) in RECIPES:
            return cls.named(str(plan))
        if not Path(plan).is_file():
            raise ValueError(f"plan {str(plan)!r} is neither a file nor one of {', '.join(RECIPES)}")
        return cls.load(plan)

    def config_for(self, layer: str) -> LayerConfig | None:
        """The settings of `layer`; None if it stays as it is."""
        if layer in self.layers:
            return self.layers[layer]
        for pattern, config in self.layers.items():
            if fnmatch.fnmatchcase(layer, pattern):
                return config
        return self.defaults

    def resolve(self, layers: Iterable[str]) -> dict[str, LayerConfig | None]:
        """The settings of each of a model's `layers`. ValueError for names and patterns that match none of them."""
        names = list(layers)
        for pattern in self.layers:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"plan names {pattern!r}, which matches no linear layer of the model")
        return {name: self.config_for(name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        default = asdict(self.defaults)
        return {
            "format": FORMAT,
            "version": VERSION,
            "defaults": default,
            "layers": {
                name: None if config is None else {k: v for k, v in asdict(config).items() if v != default[k]}
                for name, config in self.layers.items()
            },
            "produced_by": self.produced_by,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'not a plan: "format" must be {FORMAT!r}')
        if data.get("version") != VERSION:
            raise ValueError(f"plan version must be {VERSION}, got {data.get('version')!r}")
        unknown = sorted(set(data) - {"format", "version", "defaults", "layers", "produced_by"})
        if unknown:
            raise ValueError(f"plan: unknown field {unknown[0]!r}")
        defaults = _layer_config("plan defaults", data.get("defaults", {}), LayerConfig())
        layers = data.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ValueError(f"plan layers must be an object, got {layers!r}")
        return cls(
            defaults,
            {
                name: None if settings is None else _layer_config(f"plan layer {name!r}", settings, defaults)
                for name, settings in layers.items()
            },
            dict(data.get("produced_by", {})),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


RECIPES = {
    "w6a8": Plan(produced_by={"recipe": "w6a8"}),
    "w6a6": Plan(LayerConfig(act_bits=6), produced_by={"recipe": "w6a6"}),
    # The rule of the paper's released code: down_proj at 8 bits, everything else at 6, no rotation (arXiv 2508.04405).
    "paper": Plan(
        LayerConfig(act_bits=6, rotation="none"),
        {"*down_proj": LayerConfig(act_bits=8, rotation="none")},
        {"recipe": "paper"},
    ),
    "rtn": Plan(LayerConfig(rotation="none"), produced_by={"recipe": "rtn"}),
}
RECIPES["fast"] = RECIPES["w6a8"]
DEFAULT_RECIPE = "w6a8"
