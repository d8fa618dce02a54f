"""What a model's linear layers cost on a device with 6-bit and with 8-bit activations, measured."""

from dataclasses import dataclass

import torch
from torch import nn

from flexq.bench.linear import bench_linear
from flexq.linear import Linear
from flexq.planning.sensitivity import quantized_layers
from flexq.progress import Progress

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
    todo = sorted(set(kinds.values()))
    where = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    costs = {}
    for n, k, scheme, bits in progress(todo) if progress else todo:
        configs = ((6, scheme), (8, scheme))
        points = bench_linear([(n, k)], [tokens], device=device, configs=configs, peers=False, weight_bits=(bits,))
        at_6, at_8 = (point.microseconds for point in points)
        costs[n, k, scheme, bits] = LayerCost(at_6, at_8, where)
    free = LayerCost(0.0, 0.0, where)
    return {name: costs[kinds[name]] if name in kinds else free for name in layers}
