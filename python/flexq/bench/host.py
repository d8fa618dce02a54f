"""`flexq bench host`: what an operator costs the host, whatever the device does meanwhile."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear

_CALLS, _ROUNDS = 200, 15


@dataclass
class HostPoint:
    """Microseconds of host time a call of an operator takes, median over rounds of calls that are not waited for.

    Args:
        operator: its name.
        microseconds: a call.
    """

    operator: str
    microseconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_host(device: str = "cpu") -> list[HostPoint]:
    """Each operator on one token of 128 features: on a GPU the host alone counts, on the CPU the work is included.

    Args:
        device: "cpu" or a CUDA device.
    """
    k = n = 128
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    layer = Linear.from_float(linear)
    x, up, weight = (torch.randn(1, k, device=device, dtype=dtype) for _ in range(3))
    norm, packed, bits = weight[0].contiguous(), layer._packed, ("group", "hadamard128")
    gate_up, flexq = torch.cat([x, up], -1), torch.ops.flexq
    quantized = flexq.quantize_activation(x, 8, *bits)
    calls: dict[str, Callable[[], Any]] = {
        "flexq.Linear": lambda: layer(x),
        "flexq.linear": lambda: flexq.linear(x, packed, None, n, 8, *bits),
        "flexq.gemm": lambda: flexq.gemm(quantized, packed, None, 1, n, k, 8, *bits, dtype),
        "flexq.quantize_activation": lambda: flexq.quantize_activation(x, 8, *bits),
        "flexq.rms_norm_quantize": lambda: flexq.rms_norm_quantize(x, up, norm, 1e-6, 8, *bits),
        "flexq.silu_mul_quantize": lambda: flexq.silu_mul_quantize(x, up, 8, *bits),
        "flexq.rms_norm_linear": lambda: flexq.rms_norm_linear(x, up, norm, 1e-6, packed, None, n, 8, *bits),
        "flexq.silu_mul_linear": lambda: flexq.silu_mul_linear(gate_up, packed, None, n, 8, *bits),
        "torch.nn.functional.linear": lambda: nn.functional.linear(x, linear.weight),
        "torch.nn.Linear": lambda: linear(x),
    }
    with torch.inference_mode():
        return [HostPoint(name, _microseconds(call, device)) for name, call in calls.items()]


def _microseconds(call: Callable[[], Any], device: str) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append((time.perf_counter() - begin) / _CALLS * 1e6)
        if device != "cpu":
            torch.cuda.synchronize()
    return statistics.median(rounds)
