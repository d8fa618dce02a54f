"""What a model's linear layers cost on a device, by activation bits or by weight bits, measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flexq.bench.linear import bench_linear
from flexq.linear import Linear
from flexq.ops import WEIGHT_BITS
from flexq.plan import LayerConfig
from flexq.planning.sensitivity import quantized_layers
from flexq.progress import Progress
from flexq.quantize.experts import kind_of, module_of
from flexq.quantize.layers import as_linear

DEFAULT_TOKENS = 16
# A6 saves time where it is faster by more than two runs of the same kernel differ.
_MARGIN = 0.03


@dataclass(frozen=True)
class LayerCost:
    """Microseconds of one layer's kernels, quantization of the activations included.

    Args:
        at_6, at_8: with activations of so many bits.
        device: its name.
    """

    at_6: float
    at_8: float
    device: str

    @property
    def a6_saves(self) -> bool:
        return self.at_6 < (1 - _MARGIN) * self.at_8


def measure_costs(
    model: nn.Module, tokens: int = DEFAULT_TOKENS, device: str = "cpu", progress: Progress | None = None
) -> dict[str, LayerCost]:
    """The cost of every quantized layer, each shape, scheme and number of weight bits measured once.

    Experts are not measured: how long they take depends on where a router sends tokens. They count as free at either
    width, so that A6 saves nothing there and they stay at A8.

    Args:
        model: quantized.
        tokens: a layer's.
        device: "cpu" or "cuda": where the model is to run, wherever it is now.
        progress: wraps the loop over shapes.

    Raises:
        ValueError: no quantized layer.
    """
    layers = quantized_layers(model)
    kinds = {
        name: (layer.out_features, layer.in_features, layer.config.scheme, layer.config.weight_bits)
        for name, layer in layers.items()
        if isinstance(layer, Linear)
    }
    where = _name_of(device)
    costs = {}
    for kind in _each_once(kinds.values(), progress):
        n, k, scheme, bits = kind
        at_6, at_8 = _microseconds((n, k), tokens, device, scheme, (6, 8), (bits,))
        costs[kind] = LayerCost(at_6, at_8, where)
    free = LayerCost(0.0, 0.0, where)
    return {name: costs[kinds[name]] if name in kinds else free for name in layers}


@dataclass(frozen=True)
class WidthCosts:
    """What layers take at each number of weight bits.

    Args:
        microseconds: of each layer's kernels by weight bits, quantization of the activations included.
        device: its name.
        tokens: a layer's.
    """

    microseconds: Mapping[str, Mapping[int, float]]
    device: str
    tokens: int


def measure_width_costs(
    model: nn.Module,
    configs: Mapping[str, LayerConfig],
    tokens: int = DEFAULT_TOKENS,
    device: str = "cpu",
    progress: Progress | None = None,
) -> WidthCosts:
    """The cost of layers at 4, 5, 6 and 8 weight bits, each shape, scheme and number of activation bits measured once.

    Args:
        model: not quantized.
        configs: of the layers to measure; their weight bits do not matter.
        tokens, device, progress: as for `measure_costs`.

    Raises:
        ValueError: experts among the layers, whose time depends on where a router sends tokens.
    """
    kinds = {}
    for name, config in configs.items():
        module = module_of(model, name)
        if kind_of(module) is not None:
            raise ValueError(f"the time of experts depends on their router and is not measured: {name}; budget bytes")
        kinds[name] = (*as_linear(module).weight.shape, config.scheme, config.act_bits)
    costs = {}
    for kind in _each_once(kinds.values(), progress):
        n, k, scheme, act_bits = kind
        times = _microseconds((n, k), tokens, device, scheme, (act_bits,), WEIGHT_BITS)
        costs[kind] = dict(zip(WEIGHT_BITS, times, strict=True))
    return WidthCosts({name: costs[kind] for name, kind in kinds.items()}, _name_of(device), tokens)


def _each_once(kinds: Iterable[tuple], progress: Progress | None) -> Iterable[tuple]:
    todo = sorted(set(kinds))
    return progress(todo) if progress else todo


def _name_of(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def _microseconds(
    shape: tuple[int, int],
    tokens: int,
    device: str,
    scheme: str,
    act_bits: Sequence[int],
    weight_bits: Sequence[int],
) -> list[float]:
    """Of one layer, by weight bits and within them by activation bits."""
    configs = [(bits, scheme) for bits in act_bits]
    points = bench_linear([shape], [tokens], device=device, configs=configs, peers=False, weight_bits=weight_bits)
    return [point.microseconds for point in points]
