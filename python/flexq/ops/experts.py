"""Experts of mixture-of-experts layers: both projections of all of them, prepacked and run."""

import functools
from typing import NamedTuple

import torch

from flexq import _core
from flexq.execution import stream_for
from flexq.ops.arguments import buffer, dtype_of, empty_bytes, matrix, num_groups, num_scales, require
from flexq.ops.registering import define


class ExpertsDesc(NamedTuple):
    """The experts of a mixture-of-experts layer: E of them, and what each computes,

    h = f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset), with gate and up the two halves of gate_up(x).

    Args:
        experts: E.
        hidden: H, features of the layer's input and output.
        intermediate: I, features of h; gate_up is [2I, H], down [H, I].
        gate_up_scheme, gate_up_rotation, gate_up_act_bits: of the first projection and its activations.
        down_scheme, down_rotation, down_act_bits: of the second.
        function: f, "silu" (g * sigmoid(alpha * g)), "gelu" or "gelu_tanh".
        alpha: of silu. 1.702 in gpt-oss.
        limit: 0 for none. 7 in gpt-oss.
        up_offset: 1 in gpt-oss.
        interleaved: rows of gate_up are gate 0, up 0, gate 1, ... instead of I of the gate and then I of up.
        gate_up_weight_bits, down_weight_bits: of the codes of each projection, 4, 5, 6 or 8.
    """

    experts: int
    hidden: int
    intermediate: int
    gate_up_scheme: str = "group"
    gate_up_rotation: str = "hadamard128"
    gate_up_act_bits: int = 8
    down_scheme: str = "group"
    down_rotation: str = "hadamard128"
    down_act_bits: int = 8
    function: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0
    interleaved: bool = False
    gate_up_weight_bits: int = 6
    down_weight_bits: int = 6

    def shape(self, projection: str) -> tuple[int, int]:
        """[N, K] of an expert's "gate_up" or "down"."""
        return (2 * self.intermediate, self.hidden) if projection == "gate_up" else (self.hidden, self.intermediate)

    def scheme(self, projection: str) -> str:
        return self.gate_up_scheme if projection == "gate_up" else self.down_scheme

    def weight_bits(self, projection: str) -> int:
        return self.gate_up_weight_bits if projection == "gate_up" else self.down_weight_bits


_EXPERTS = (
    "int experts, int hidden, int intermediate, str gate_up_scheme, str gate_up_rotation, int gate_up_act_bits,"
    " str down_scheme, str down_rotation, int down_act_bits, str function, float alpha, float limit, float up_offset,"
    " bool interleaved, int gate_up_weight_bits, int down_weight_bits"
)
_INDEX_TYPES = {torch.int32: False, torch.int64: True}


@functools.lru_cache(maxsize=4096)
def _experts_desc(*desc) -> _core.ExpertsDesc:
    return _core.ExpertsDesc(*desc)


def _fake_experts_prepack(planes, scales, projection, *desc):
    return planes.new_empty(
        _core.experts_prepack_size(stream_for(planes.device), _experts_desc(*desc), projection), dtype=torch.uint8
    )


@define(
    f"experts_prepack(Tensor planes, Tensor scales, str projection, {_EXPERTS}) -> Tensor",
    _fake_experts_prepack,
)
def _experts_prepack(planes, scales, projection, *desc):
    stream, native = stream_for(planes.device), _experts_desc(*desc)
    packed = empty_bytes(_core.experts_prepack_size(stream, native, projection), planes)
    given = ExpertsDesc(*desc)
    (n, k), scheme = given.shape(projection), given.scheme(projection)
    expected = (given.experts, n, num_groups(k), given.weight_bits(projection), 16)
    require(
        planes.dtype == torch.uint8 and planes.shape == expected,
        f"planes of {projection} must be uint8 {list(expected)}, got {planes.dtype} {list(planes.shape)}",
    )
    expected = (given.experts, n, num_scales(k, scheme))
    require(
        scales.dtype == torch.float16 and scales.shape == expected,
        f"scales of {projection} must be float16 {list(expected)} for scheme {scheme}, got {scales.dtype} "
        f"{list(scales.shape)}",
    )
    _core.experts_prepack(stream, native, projection, planes.contiguous(), scales.contiguous(), packed)
    return packed


def experts_prepack(planes: torch.Tensor, scales: torch.Tensor, projection: str, desc: ExpertsDesc) -> torch.Tensor:
    """One projection ("gate_up" or "down") of all experts: canonical planes uint8 [E, N, G, b, 16] and scales float16
    [E, N, G] or [E, N, 1] -> the bytes that the kernels of their device read."""
    return torch.ops.flexq.experts_prepack(planes, scales, projection, *desc)


def _fake_experts_unprepack(packed, projection, *desc):
    given = ExpertsDesc(*desc)
    n, k = given.shape(projection)
    planes = packed.new_empty((given.experts, n, num_groups(k), given.weight_bits(projection), 16), dtype=torch.uint8)
    return planes, packed.new_empty((given.experts, n, num_scales(k, given.scheme(projection))), dtype=torch.float16)


@define(
    f"experts_unprepack(Tensor packed, str projection, {_EXPERTS}) -> (Tensor, Tensor)",
    _fake_experts_unprepack,
)
def _experts_unprepack(packed, projection, *desc):
    native = _experts_desc(*desc)
    planes, scales = _fake_experts_unprepack(packed, projection, *desc)
    _core.experts_unprepack(stream_for(packed.device), native, projection, packed, planes, scales)
    return planes, scales


def experts_unprepack(packed: torch.Tensor, projection: str, desc: ExpertsDesc) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `experts_prepack`, exact."""
    return torch.ops.flexq.experts_unprepack(packed, projection, *desc)


def _fake_experts_forward(x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc):
    return x.new_empty(x.shape)


@define(
    "experts_forward(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias,"
    f" Tensor? down_bias, Tensor? expert_map, bool weights_on_input, {_EXPERTS}) -> Tensor",
    _fake_experts_forward,
)
def _experts_forward(x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc):
    device, shape = x.device, x.shape
    dtype = dtype_of("x", x.dtype)
    native, given = _experts_desc(*desc), ExpertsDesc(*desc)
    x, m, ldx = matrix(x)
    require(shape[-1] == given.hidden, f"x must be [..., {given.hidden}], got {list(shape)}")
    require(
        ids.dtype in _INDEX_TYPES and ids.dim() > 0 and ids.shape[:-1] == shape[:-1] and ids.shape[-1] > 0,
        f"ids must be int32 or int64 {[*shape[:-1], 'top_k']}, got {ids.dtype} {list(ids.shape)}",
    )
    require(weights.shape == ids.shape, f"weights must be like ids, {list(ids.shape)}, got {list(weights.shape)}")
    weights_dtype = dtype_of("weights", weights.dtype)
    if expert_map is not None:
        require(
            expert_map.dtype == torch.int32 and expert_map.dim() == 1 and expert_map.is_contiguous(),
            f"expert_map must be contiguous int32 [experts everywhere], got {expert_map.dtype} "
            f"{list(expert_map.shape)}",
        )
    for name, tensor in (
        ("ids", ids), ("weights", weights), ("gate_up", gate_up), ("down", down), ("expert_map", expert_map),
    ):  # fmt: skip
        require(tensor is None or tensor.device == device, f"x is on {device}, {name} not")
    up_bias = _expert_bias("gate_up_bias", gate_up_bias, given.experts, 2 * given.intermediate, device)
    out_bias = _expert_bias("down_bias", down_bias, given.experts, given.hidden, device)
    require(
        gate_up_bias is None or down_bias is None or up_bias[1] == out_bias[1],
        "gate_up_bias and down_bias must have the same dtype",
    )
    ids, weights = ids.contiguous(), weights.contiguous()
    stream, top_k = stream_for(device), ids.shape[-1]
    y = x.new_empty(shape)
    workspace = empty_bytes(_core.experts_workspace_size(stream, native, m, top_k, dtype), x)
    _core.experts_forward(
        stream, native, *buffer("gate_up", gate_up), *buffer("down", down), m, top_k, ids.data_ptr(),
        _INDEX_TYPES[ids.dtype], weights.data_ptr(), weights_dtype,
        0 if expert_map is None else expert_map.data_ptr(), 0 if expert_map is None else expert_map.numel(),
        weights_on_input, x.data_ptr(), dtype, ldx, up_bias[0], out_bias[0], max(up_bias[1], out_bias[1]),
        y.data_ptr(), dtype, given.hidden, workspace.data_ptr(), workspace.numel(),
    )  # fmt: skip
    return y


def experts_forward(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    desc: ExpertsDesc,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    weights_on_input: bool = False,
) -> torch.Tensor:
    """x [..., H] through each token's experts `ids` [..., top_k] (int32, int64), added up by the router's `weights`.

    `gate_up` and `down` are prepacked; biases are [E, 2I] and [E, H]. With an `expert_map`, int32 [experts everywhere],
    ids are indices of it, and it has the local index of each or -1: what is not here adds nothing. ValueError for other
    ids on the CPU; on a GPU they add nothing either. `weights_on_input` multiplies the inputs by the router's weights
    instead of the outputs. Returns [..., H] of x's dtype.
    """
    return torch.ops.flexq.experts_forward(
        x, ids, weights, gate_up, down, gate_up_bias, down_bias, expert_map, weights_on_input, *desc
    )


def _expert_bias(name: str, bias: torch.Tensor | None, experts: int, n: int, device: torch.device) -> tuple[int, int]:
    """Address and dtype."""
    if bias is None:
        return 0, 0
    if bias.shape != (experts, n) or not bias.is_contiguous() or bias.device != device:
        raise ValueError(
            f"{name} must be contiguous [{experts}, {n}] on {device}, got {list(bias.shape)} on {bias.device}"
        )
    return bias.data_ptr(), dtype_of(name, bias.dtype)
