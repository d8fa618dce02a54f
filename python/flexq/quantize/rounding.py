"""Compensated rounding of weights to codes of few bits, given how the layer's inputs correlate.

Each code is rounded in turn and its error made up for in those still to come, as in GPTQ (arXiv 2210.17323), columns by
falling Hessian diagonal, against scales that are fixed beforehand for least error in the Hessian's metric; then every
code is revisited with all others fixed (coordinate descent). All of it in the rotated basis, in which the weight is
stored.
"""

import functools
from collections.abc import Sequence

import torch

from flexq import ops
from flexq.plan import LayerConfig
from flexq.quantize.hessian import Hessian, inverse_factor, order_of, pad, padded, rotate

# Shares of absmax / the largest code that are tried as a scale; the fewer the codes, the lower they go.
_RATIOS = (1.0, 31 / 32, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75)
_LOWER_RATIOS = {4: (0.725, 0.7, 0.675, 0.65, 0.625, 0.6, 0.575, 0.55, 0.525, 0.5), 5: (0.725, 0.7, 0.675, 0.65)}
_BLOCK = 128  # columns after which the columns to come are brought up to date at once
_KEPT_GRAPHS = 16
_SLICE = 1 << 26  # values that are rounded at a time, whole rows: an LM head takes several slices


def _max_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _choose_scales(weight: torch.Tensor, importance: torch.Tensor, config: LayerConfig) -> torch.Tensor:
    """fp16 [N, G] or [N, 1], stored values: of the ratios the one of least squared error weighted by `importance` [Kp].

    A scale that would vanish in float16 is 0, and so are its codes.

    Raises:
        ValueError: a scale that float16 cannot hold.
    """
    width = ops.GROUP_SIZE if config.scheme == "group" else weight.shape[1]
    bits, max_code = config.weight_bits, _max_code(config.weight_bits)
    ratios = (*_RATIOS, *_LOWER_RATIOS.get(bits, ()))
    groups = weight.view(len(weight), weight.shape[1] // width, width)
    importance = importance.view(-1, width)
    largest = groups.abs().amax(-1)
    most = torch.finfo(torch.float16).max * max_code / ratios[-1]
    if not (largest < most).all():
        raise ValueError(
            f"float16 scales cannot hold a weight of {largest.max():.3g} (rotated, if it is); at most {most:.3g}"
        )
    best_error = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest)
    for ratio in ratios:
        scale = (largest * (ratio / max_code)).half().float()
        codes = _nearest(bits, groups, scale.where(scale > 0, 1.0).unsqueeze(-1))
        error = ((groups - codes * scale.unsqueeze(-1)).square_() * importance).sum(-1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best.half()


def compensated_round(
    weight: torch.Tensor, hessian: Hessian, config: LayerConfig, damping: float = 0.01, passes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [N, K] to canonical planes uint8 [N, G, b, 16] and scales float16.

    Args:
        weight: floating point, on any device.
        hessian: of the layer's inputs, on the same device.
        config: weight bits b, scheme and rotation.
        damping: share of the mean diagonal that is added to the diagonal; rank-deficient inputs get more if need be.
        passes: of coordinate descent after the first rounding.

    Raises:
        ValueError: weights that are not finite or that float16 scales cannot hold.
    """
    slices = weight.detach().split(max(1, _SLICE // padded(weight.shape[1])))
    _require_finite(slices)
    h = hessian.mean(config.rotation, damping)
    importance, order = h.diagonal().clamp(min=0), order_of(h)
    h = h[order][:, order].contiguous()
    factor = inverse_factor(h, damping)
    importance = importance + damping * importance.mean()
    rounded = [_round_rows(rows, h, factor, order, importance, config, passes) for rows in slices]
    planes, scales = (torch.cat(each) for each in zip(*rounded, strict=True))
    return planes, scales


def _require_finite(slices: Sequence[torch.Tensor]) -> None:
    """ValueError that names the first value that is not finite, of a weight's rows in slices."""
    begin = 0
    for rows in slices:
        bad = (~torch.isfinite(rows)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            value = rows[row, column].item()
            raise ValueError(f"weight[{begin + row}][{column}] is {value}; weights must be finite")
        begin += len(rows)


def _round_rows(
    rows: torch.Tensor,
    h: torch.Tensor,
    factor: torch.Tensor,
    order: torch.Tensor,
    importance: torch.Tensor,
    config: LayerConfig,
    passes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`compensated_round` of some rows; `h` and its `factor` have columns in their `order`, `importance` has not."""
    w = rotate(pad(rows.float()), config.rotation)
    scales = _choose_scales(w, importance, config)
    width = ops.GROUP_SIZE if config.scheme == "group" else w.shape[1]
    # Each column with its scale; transposed, so that a column is a stretch of memory.
    step = scales.float().repeat_interleave(width, 1).T[order].contiguous()
    target = w.T[order].contiguous()
    codes = _round_in_turn(config.weight_bits, target, step, factor)
    for _ in range(passes):
        _descend(config.weight_bits, target, step, h, codes)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return ops.pack_codes(codes[back].T.to(torch.int8), config.weight_bits), scales


def empty_codes(rows: int, k: int, config: LayerConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes and scales of a weight [rows, k], not filled."""
    groups = ops.num_groups(k)
    planes = torch.empty(rows, groups, config.weight_bits, 16, dtype=torch.uint8, device=device)
    return planes, torch.empty(rows, groups if config.scheme == "group" else 1, dtype=torch.float16, device=device)


def _captured(function):
    """A function of bits and tensors whose many small kernels are captured as one CUDA graph for each bits and set of
    shapes."""
    graphs: dict[tuple, tuple] = {}

    @functools.wraps(function)
    def call(bits: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not tensors[0].is_cuda:
            return function(bits, *tensors)
        key = bits, tuple((t.shape, t.device) for t in tensors)
        if key not in graphs:
            while len(graphs) >= _KEPT_GRAPHS:
                graphs.pop(next(iter(graphs)))
            inputs = [t.clone() for t in tensors]
            function(bits, *inputs)  # whatever is set up at a first call
            torch.cuda.synchronize(tensors[0].device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(tensors[0].device), torch.cuda.graph(graph):
                outputs = function(bits, *inputs)
            graphs[key] = graph, inputs, outputs
        graph, inputs, outputs = graphs[key]
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return call


def _nearest(bits: int, values: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Codes of so many bits, as floats."""
    return (values / divisor).round_().clamp_(-_max_code(bits) - 1, _max_code(bits))


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """The scale that values are divided by: where it is 0, all codes are."""
    return step.where(step > 0, torch.inf)


@_captured
def _round_block(
    bits: int, block: torch.Tensor, step: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [B, N] of a block's columns, and each one's error in units of what makes up for it."""
    left, divisor = block.clone(), _divisor(step)
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for i in range(len(left)):
        codes[i] = _nearest(bits, left[i], divisor[i])
        errors[i] = (left[i] - codes[i] * step[i]) / factor[i, i]
        left[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


def _round_in_turn(bits: int, target: torch.Tensor, step: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Codes as floats [Kp, N]; `factor` is the upper Cholesky factor of the inverse Hessian."""
    left = target.clone()
    codes = torch.empty_like(left)
    for begin in range(0, len(left), _BLOCK):
        end = min(begin + _BLOCK, len(left))
        codes[begin:end], errors = _round_block(bits, left[begin:end], step[begin:end], factor[begin:end, begin:end])
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes


@_captured
def _descend_block(
    bits: int, codes: torch.Tensor, step: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Better codes [B, N] of a block's columns, and by how much the error changes."""
    codes, gradient, divisor = codes.clone(), gradient.clone(), _divisor(step)
    changes = torch.empty_like(codes)
    for i in range(len(codes)):
        curvature = hessian[i, i]
        best = _nearest(bits, codes[i] * step[i] + gradient[i] / curvature, divisor[i])
        best = best.where(curvature > 0, codes[i])
        changes[i] = (codes[i] - best) * step[i]
        codes[i] = best
        gradient[i:].addr_(hessian[i:, i], changes[i])
    return codes, changes


def _descend(bits: int, target: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor) -> None:
    """Each column in turn to its best codes while the others stay: one pass, in place."""
    error = target - codes * step
    for begin in range(0, len(target), _BLOCK):
        block = slice(begin, min(begin + _BLOCK, len(target)))
        gradient = hessian[block] @ error
        codes[block], changes = _descend_block(bits, codes[block], step[block], gradient, hessian[block, block])
        error[block] += changes
