"""Plans: which layers are quantized, and how. A JSON that a person can edit (docs/reference/formats.md)."""

import fnmatch
import functools
import hashlib
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
    "weight_bits": (4, 5, 6, 8),
}
EMBEDDING_BITS = (8,)


@dataclass(frozen=True)
class LayerConfig:
    """How one linear layer, or one projection of all experts, is quantized.

    Args:
        act_bits: 6 or 8, bits of the activations.
        scheme: "group": a scale per row (token) and 128 inputs; "channel": one per row (token).
        rotation: "hadamard128" rotates each group of 128 before quantization, "none" does not.
        weight_bits: 4, 5, 6 or 8, bits of the weight's codes.
    """

    act_bits: int = 8
    scheme: str = "group"
    rotation: str = "hadamard128"
    weight_bits: int = 6

    def __post_init__(self):
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            # Of its very type: JSON's 8.0 and true equal 8 and 1.
            if type(value) is not type(accepted[0]) or value not in accepted:
                *others, last = map(repr, accepted)
                choices = f"{', '.join(others)} or {last}"
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError for a name that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


@dataclass(frozen=True)
class Plan:
    """Settings for the linear layers of a model.

    Args:
        defaults: for every layer that `layers` does not name.
        layers: layer name, or pattern as in `fnmatch` ("*.down_proj"), to its settings, or None to leave it as it is.
            An exact name goes before patterns, an earlier pattern before a later one.
        produced_by: free-form record of how the plan came about.
        embeddings: bits of the token embedding, 8, or None to leave it as it is. An LM head that is tied to it is then
            quantized too: as `layers` says, else with 8-bit weights and activations in scheme "channel".
    """

    defaults: LayerConfig = field(default_factory=LayerConfig)
    layers: dict[str, LayerConfig | None] = field(default_factory=dict)
    produced_by: dict[str, Any] = field(default_factory=dict)
    embeddings: int | None = None

    def __post_init__(self):
        if self.embeddings is not None and (type(self.embeddings) is not int or self.embeddings not in EMBEDDING_BITS):
            raise ValueError(f"embeddings must be 8, or none to leave them as they are, got {self.embeddings!r}")

    @classmethod
    def uniform(cls, embeddings: int | None = None, **settings: Any) -> "Plan":
        """The same `LayerConfig` settings for every layer."""
        return cls(_layer_config("plan", settings, LayerConfig()), {}, {"recipe": "uniform"}, embeddings)

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
            raise ValueError(
                f"plan {str(plan)!r} is neither a file nor one of {', '.join(RECIPES)} (best is of calibration: flexq "
                "quantize --calibrate)"
            )
        return cls.load(plan)

    def config_for(self, layer: str, whole: str | None = None) -> LayerConfig | None:
        """The settings of `layer`; None if it stays as it is.

        Args:
            layer: its name.
            whole: of a projection of experts, the experts' name, which a plan may have in place of both projections.
        """
        names = (layer,) if whole is None else (layer, whole)
        for name in names:
            if name in self.layers:
                return self.layers[name]
        for pattern, config in self._patterns.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return config
        return self.defaults

    def resolve(self, layers: Iterable[str], wholes: Mapping[str, str] | None = None) -> dict[str, LayerConfig | None]:
        """The settings of each of a model's `layers`. ValueError for names and patterns that match none of them.

        Args:
            layers: their names.
            wholes: of those that are projections of experts, the experts' names.
        """
        names, wholes = list(layers), wholes or {}
        known, patterns = {*names, *wholes.values()}, self._patterns
        unused = [name for name in self.layers if name not in known and name not in patterns]
        unmatched = [p for p in patterns if p not in known and not fnmatch.filter(known, p)]
        # A recipe's patterns are the names that such a layer has in one model or another: some match.
        if self.produced_by.get("recipe") not in RECIPES:
            unused += unmatched
        elif patterns and len(unmatched) == len(patterns):
            raise ValueError(
                f"recipe {self.produced_by['recipe']} looks for layers like {', '.join(patterns)}, and the model has "
                "none; write a plan that names its layers"
            )
        if unused:
            is_head = unused[0] in patterns and unused[0].endswith(("head", "embed_out"))
            hint = "; an LM head goes by its exact name" if is_head else ""
            raise ValueError(f"plan names {unused[0]!r}, which matches no linear layer of the model{hint}")
        return {name: self.config_for(name, wholes.get(name)) for name in names}

    @functools.cached_property
    def _patterns(self) -> dict[str, LayerConfig | None]:
        """The entries of `layers` that are patterns."""
        return {name: config for name, config in self.layers.items() if any(c in name for c in "*?[")}

    def to_dict(self) -> dict[str, Any]:
        default = asdict(self.defaults)
        return {
            "format": FORMAT,
            "version": VERSION,
            "defaults": default,
            **({} if self.embeddings is None else {"embeddings": self.embeddings}),
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
        unknown = sorted(set(data) - {"format", "version", *(f.name for f in fields(cls))})
        if unknown:
            raise ValueError(f"plan: unknown field {unknown[0]!r}")
        defaults = _layer_config("plan defaults", data.get("defaults", {}), LayerConfig())
        layers, produced_by = data.get("layers", {}), data.get("produced_by", {})
        for name, value in (("layers", layers), ("produced_by", produced_by)):
            if not isinstance(value, Mapping):
                raise ValueError(f"plan {name} must be an object, got {value!r:.60}")
        return cls(
            defaults,
            {
                name: None if settings is None else _layer_config(f"plan layer {name!r}", settings, defaults)
                for name, settings in layers.items()
            },
            dict(produced_by),
            data.get("embeddings"),
        )

    def fingerprint(self) -> str:
        """SHA-256 of what the plan does to each of the layers it names: equal for plans that do the same to them."""
        settings = {name: None if config is None else asdict(config) for name, config in self.layers.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan's JSON, or that in a FlexQ checkpoint's config.json. ValueError for one that is not a plan, which
        names the file; OSError for a file that cannot be read."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_object)
            settings = data.get("quantization_config") if isinstance(data, Mapping) else None
            return cls.from_dict(settings["plan"] if isinstance(settings, Mapping) and "plan" in settings else data)
        except RecursionError:
            raise ValueError(f"{path} is not a plan: it is nested too deeply") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


# What models call the layer that leads from an MLP's inner features back to the hidden size.
_SECOND_PROJECTIONS = (
    "*down_proj",
    "*dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM
    "*fc2",  # Phi, OPT, BART, Whisper
    "*fc_out",  # GPT-J
    "*mlp.c_proj",  # GPT-2, GPT-Neo
    "*[0-9].output.dense",  # BERT and its like
    "*ffn.lin2",  # DistilBERT
    "*.ffn_output",  # ALBERT
    "*.wo",  # T5
    "*.w2",  # Mixtral and older Llamas
    "*mlp.Wo",  # ModernBERT
    "*output_linear",  # Granite
)

RECIPES = {
    "w6a8": Plan(produced_by={"recipe": "w6a8"}),
    "w6a6": Plan(LayerConfig(act_bits=6), produced_by={"recipe": "w6a6"}),
    # The rule of the paper's released code: down_proj, the MLP's second projection, at 8 bits, everything else at 6, no
    # rotation (arXiv 2508.04405).
    "paper": Plan(
        LayerConfig(act_bits=6, rotation="none"),
        dict.fromkeys(_SECOND_PROJECTIONS, LayerConfig(act_bits=8, rotation="none")),
        {"recipe": "paper"},
    ),
    "rtn": Plan(LayerConfig(rotation="none"), produced_by={"recipe": "rtn"}),
}
RECIPES["fast"] = RECIPES["w6a8"]
DEFAULT_RECIPE = "w6a8"
