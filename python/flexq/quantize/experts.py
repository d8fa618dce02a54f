"""Modules that hold a layer's experts as 3D parameters, found by what they compute, and what takes their places.

transformers has a class of them for nearly every model. A small copy of a module, of the same class and settings, is
asked what it makes of a few tokens; whatever answers like `flexq.experts.float_experts` is understood.
"""

import copy
import inspect
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.experts import Experts, ExpertsByRows, by_rows, float_experts
from flexq.plan import LayerConfig

PROJECTIONS = ("gate_up_proj", "down_proj")
_HIDDEN, _INTERMEDIATE, _TOKENS = 8, 6, 6  # of the small copy
_QUICK_GELU = 1.702
_EXACT = 1e-12
_TOLERANCE = 1e-5  # relative: some compute in float32, and GELU and its approximation differ by more


@dataclass(frozen=True)
class Kind:
    """What a module of experts holds and computes.

    Args:
        desc: as `flexq.ops` has it, with default formats.
        transposed: weights are [E, K, N].
        bias: there are biases, `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H].
        weights_on_input: the router's weights multiply inputs.
        by_rows: it is called with each expert's rows, as `flexq.experts.ExpertsByRows`.
    """

    desc: ops.ExpertsDesc
    transposed: bool = False
    bias: bool = False
    weights_on_input: bool = False
    by_rows: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the module's parameters."""
        return (*PROJECTIONS, *(f"{p}_bias" for p in PROJECTIONS)) if self.bias else PROJECTIONS

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """A projection's weight, as the module or its checkpoint has it, as [E, N, K]."""
        return weight.transpose(1, 2) if self.transposed else weight

    def empty(self, gate_up: LayerConfig, down: LayerConfig, dtype: torch.dtype) -> Experts:
        """Experts on the meta device."""
        d = self.desc
        return self._class(
            d.experts, d.hidden, d.intermediate, self.bias, gate_up, down, device="meta", dtype=dtype, **self._settings
        )

    def from_canonical(self, gate_up, down, biases, gate_up_config, down_config, dtype, prepack=True) -> Experts:
        """Experts around planes and scales of each projection and, as `biases`, a tensor or None for each."""
        return self._class.from_canonical(
            gate_up, down, self.desc.intermediate, *biases, gate_up_config, down_config, prepack, dtype=dtype,
            **self._settings,
        )  # fmt: skip

    @property
    def _class(self) -> type[Experts]:
        return ExpertsByRows if self.by_rows else Experts

    @property
    def _settings(self) -> dict[str, Any]:
        named = {n: getattr(self.desc, n) for n in ("function", "alpha", "limit", "up_offset", "interleaved")}
        return named | {"weights_on_input": self.weights_on_input}


_kinds: "weakref.WeakKeyDictionary[nn.Module, Kind | None]" = weakref.WeakKeyDictionary()


def kind_of(module: nn.Module) -> Kind | None:
    """What a module of experts in floating point computes; None for one that is none, or that is not understood."""
    parameters = dict(module.named_parameters(recurse=False))
    if not set(PROJECTIONS) <= set(parameters):
        return None
    if module not in _kinds:
        with torch.device("cpu"), torch.no_grad():  # whatever device models are being made on
            _kinds[module] = _find_out(module, parameters)
    return _kinds[module]


def _find_out(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Kind | None:
    layout = _layout(parameters)
    if layout is None or any(True for child in module.children() for _ in child.parameters()):
        return None
    numbers = _numbers(module)
    scale = max([2.0, *numbers])
    small, tensors = _small_copy(module, layout, scale)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_TOKENS, _HIDDEN, dtype=torch.float64, generator=generator)
    k = min(2, layout.desc.experts)
    ids = torch.stack([torch.randperm(layout.desc.experts, generator=generator)[:k] for _ in range(_TOKENS)])
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator) + 0.2
    routed = _answer(small, x, ids, weights)
    is_by_rows = routed is None
    if is_by_rows:
        x = torch.randn(layout.desc.experts, 2, _HIDDEN, dtype=torch.float64, generator=generator).flatten(0, 1)
        ids, weights, _ = by_rows(x, layout.desc.experts)
        routed = _answer(small, x)
    if routed is None or routed.shape != x.shape:
        return None
    desc = layout.desc._replace(hidden=_HIDDEN, intermediate=_INTERMEDIATE)
    best, kind = _TOLERANCE, None
    for settings, on_input in _candidates(numbers, is_by_rows):
        expected = float_experts(desc._replace(**settings), x, ids, weights, *tensors, weights_on_input=on_input)
        error = float((routed.double() - expected).norm() / expected.norm())
        if error < best:
            best = error
            kind = Kind(layout.desc._replace(**settings), layout.transposed, layout.bias, on_input, is_by_rows)
        if error < _EXACT:
            break
    return kind


def _numbers(module: nn.Module) -> list[float]:
    """The module's settings that may be an alpha or a limit."""
    numbers = []
    for name, value in vars(module).items():
        is_whole = type(value) is int and ("limit" in name or "alpha" in name)
        if (is_whole or type(value) is float) and value > 0:
            numbers.append(float(value))
    return numbers


def _layout(parameters: dict[str, nn.Parameter]) -> Kind | None:
    """Sizes and orientation by shapes."""
    bias = len(parameters) == 4 and all(f"{p}_bias" in parameters for p in PROJECTIONS)
    if not bias and len(parameters) != 2:
        return None
    gate_up, down = (tuple(parameters[p].shape) for p in PROJECTIONS)
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    for transposed in (False, True):
        (n, h), (out, i) = (shape[:0:-1] if transposed else shape[1:] for shape in (gate_up, down))
        if n == 2 * i and h == out and min(n, h) > 0:
            desc = ops.ExpertsDesc(gate_up[0], h, i)
            if bias and [tuple(parameters[f"{p}_bias"].shape[1:]) for p in PROJECTIONS] != [(n,), (h,)]:
                return None
            return Kind(desc, transposed, bias)
    return None


class _Eager:
    """A configuration by which experts run their class's own code."""

    _experts_implementation = "eager"

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self._config, name)


def _small_copy(module: nn.Module, layout: Kind, scale: float) -> tuple[nn.Module, list[torch.Tensor]]:
    """The module with small weights, and these as [E, N, K], with biases [E, N].

    Args:
        module: whose class and settings it has.
        layout: of its weights.
        scale: of gate and up values, large enough to reach limits.
    """
    generator = torch.Generator().manual_seed(0)
    desc = layout.desc._replace(hidden=_HIDDEN, intermediate=_INTERMEDIATE)
    parameters, tensors = {}, []
    for name, projection in zip(PROJECTIONS, ("gate_up", "down"), strict=True):
        n, k = desc.shape(projection)
        weight = torch.randn(desc.experts, n, k, dtype=torch.float64, generator=generator) * (scale / k**0.5)
        stored = weight.transpose(1, 2).contiguous() if layout.transposed else weight
        parameters[name] = nn.Parameter(stored, requires_grad=False)
        tensors.append(weight)
    if layout.bias:
        for name in PROJECTIONS:
            like = tensors[PROJECTIONS.index(name)]
            bias = torch.randn(like.shape[:2], dtype=torch.float64, generator=generator)
            parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
            tensors.append(bias)
    small = copy.copy(module)
    small.__dict__["_parameters"] = parameters
    for name, value in vars(module).items():
        if type(value) is int and value == layout.desc.hidden and "hidden" in name:
            small.__dict__[name] = _HIDDEN
        elif type(value) is int and value == layout.desc.intermediate and ("intermediate" in name or "dim" in name):
            small.__dict__[name] = _INTERMEDIATE
    if hasattr(module, "config"):
        small.__dict__["config"] = _Eager(module.config)
    return small, tensors


def _answer(module: nn.Module, *args: torch.Tensor) -> torch.Tensor | None:
    """What its class's code makes of the arguments; None if it does not take them."""
    try:
        y = type(module).forward(module, *args)
    except Exception:  # whatever a module that is no such thing provokes
        return None
    return y if isinstance(y, torch.Tensor) else None


def _candidates(numbers: list[float], is_by_rows: bool) -> Iterable[tuple[dict[str, Any], bool]]:
    """What experts may compute. `numbers`: the module's settings, among which alpha and limit are."""
    alphas = dict.fromkeys((1.0, *numbers, _QUICK_GELU))
    functions = [("silu", alpha) for alpha in alphas] + [("gelu", 1.0), ("gelu_tanh", 1.0)]
    limits = dict.fromkeys((0.0, *numbers))
    on_input = (False,) if is_by_rows else (False, True)
    for (function, alpha), limit, offset, interleaved, on in itertools.product(
        functions, limits, (0.0, 1.0), (False, True), on_input
    ):
        named = {"function": function, "alpha": alpha, "limit": limit, "up_offset": offset, "interleaved": interleaved}
        yield named, on


# ---- In a model ------------------------------------------------------------------------------------------------------


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts in floating point that are understood, by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and kind_of(module) is not None
    }


def whole_of(layer: str) -> str:
    """The experts that a projection is of."""
    return layer.rpartition(".")[0]


def module_of(model: nn.Module, layer: str) -> nn.Module:
    """The module that computes a layer: the layer itself or, of a projection of experts, all of the experts.

    Raises:
        AttributeError: there is none.
    """
    parent, _, child = layer.rpartition(".")
    if child in PROJECTIONS:
        module = model.get_submodule(parent)
        if isinstance(module, Experts) or kind_of(module) is not None:
            return module
    return model.get_submodule(layer)


def positional(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a module is called with, in the order of its class's parameters."""
    if not kwargs:
        return args
    return tuple(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


def routed(module: nn.Module, given: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [R, H], the experts [R, k] that each is for, E or more being none, and weights [R, k], of a call.

    Args:
        module: of experts in floating point.
        given: of `positional`.
    """
    x = given[0].detach().flatten(0, -2)
    if kind_of(module).by_rows:
        return x, *by_rows(x, kind_of(module).desc.experts)[:2]
    ids, weights = (t.detach().reshape(len(x), -1) for t in given[1:3])
    return x, ids, weights


def round_experts(name: str, weight: torch.Tensor, config: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Weights [E, N, K] to nearest: planes, scales and how many scales vanished. ValueError that names the layer."""
    planes, scales, vanished = [], [], 0
    for index, expert in enumerate(weight.detach()):
        try:
            quantized = ops.quantize_weight(expert.contiguous(), config.scheme, config.rotation, config.weight_bits)
        except ValueError as error:
            raise ValueError(f"layer {name}, expert {index}: {error}") from None
        vanished += ops.count_vanished(expert, quantized[1])
        planes.append(quantized[0])
        scales.append(quantized[1])
    return torch.stack(planes), torch.stack(scales), vanished


def replacement(
    module: nn.Module,
    gate_up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    configs: tuple[LayerConfig, LayerConfig],
    prepack: bool = True,
) -> Experts:
    """Experts of these planes and scales in the place of a module of experts, with its biases."""
    kind = kind_of(module)
    biases = [getattr(module, f"{p}_bias").detach() if kind.bias else None for p in PROJECTIONS]
    experts = kind.from_canonical(gate_up, down, biases, *configs, module.down_proj.dtype, prepack)
    return experts.train(module.training)


# ---- Routers ---------------------------------------------------------------------------------------------------------


def routers_of(model: nn.Module) -> set[str]:
    """Linear layers beside experts that weigh them, or weigh a shared one: as many outputs as experts, or one."""
    names = set()
    for name, module in model.named_modules():
        count, beside = _experts_count(module)
        if not count or not name:
            continue
        parent = name.rpartition(".")[0]
        for child, linear in model.get_submodule(parent).named_modules():
            full = f"{parent}.{child}" if parent else child
            inside = full == name or full.startswith(f"{name}.")
            if inside or _is_part_of_an_mlp(model, full, parent):
                continue
            if getattr(linear, "out_features", None) in (count, *beside):
                names.add(full)
    return names


def _is_part_of_an_mlp(model: nn.Module, name: str, parent: str) -> bool:
    """Whether a layer has others beside it in a module of its own, as those of a shared expert do."""
    container = name.rpartition(".")[0]
    if container == parent:
        return False
    return sum(hasattr(m, "out_features") for m in model.get_submodule(container).children()) > 1


def _experts_count(module: nn.Module) -> tuple[int, tuple[int, ...]]:
    """How many experts a module holds, 0 if none; and how many outputs gates beside it may have besides."""
    if isinstance(module, Experts):
        return module.num_experts, (1,)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        each = list(module.children())
        holds_layers = all(any(hasattr(m, "out_features") for m in child.modules()) for child in each)
        return (len(each) if len(each) > 1 and holds_layers else 0), ()
    if type(module).__module__.startswith("torch."):
        return 0, ()
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    counts = {shape[0] for shape in shapes if shape}
    is_experts = len(counts) == 1 and any(len(s) == 3 and min(s[1:]) > 1 for s in shapes)
    return (counts.pop(), (1,)) if is_experts else (0, ())
