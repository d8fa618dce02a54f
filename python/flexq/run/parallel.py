"""Splitting canonical weights for tensor parallelism: the rows, or the inputs, of one layer over several devices."""

import torch

from flexq.ops import GROUP_SIZE, num_groups


def possible_splits(k: int) -> list[int]:
    """Numbers of devices that K inputs can be split over: each must get whole groups of 128."""
    if k % GROUP_SIZE:
        return [1]
    groups = num_groups(k)
    return [parts for parts in range(1, groups + 1) if groups % parts == 0]


def check_input_split(name: str, k: int, parts: int) -> None:
    """ValueError if K inputs cannot be split over `parts` devices; it says what can."""
    possible = possible_splits(k)
    if parts not in possible:
        raise ValueError(
            f"{name}: {parts} devices cut its {k} inputs inside a group of {GROUP_SIZE}; possible are "
            f"{', '.join(map(str, possible))}"
        )


def split_rows(planes: torch.Tensor, scales: torch.Tensor, parts: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Device `index`'s rows of a weight (column parallel): its outputs are a part of the layer's.

    Args:
        planes: uint8 [N, G, b, 16].
        scales: float16 [N, G] or [N, 1].
        parts: devices, which divide N.
        index: 0 to parts - 1.
    """
    n = planes.shape[0]
    if not 0 <= index < parts or n % parts:
        raise ValueError(f"{n} rows cannot be split over {parts} devices, of which this is number {index}")
    rows = slice(index * n // parts, (index + 1) * n // parts)
    return planes[rows], scales[rows]


def split_inputs(
    planes: torch.Tensor, scales: torch.Tensor, k: int, parts: int, index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Device `index`'s inputs of a weight (row parallel): the sum of all devices' outputs is the layer's.

    Args:
        planes: uint8 [N, G, b, 16].
        scales: float16 [N, G] or [N, 1]; the latter is every device's.
        k: inputs, G = ceil(k / 128).
        parts: devices; each must get whole groups.
        index: 0 to parts - 1.
    """
    check_input_split("weight", k, parts)
    if not 0 <= index < parts:
        raise ValueError(f"index must be 0 to {parts - 1}, got {index}")
    groups = num_groups(k) // parts
    inputs = slice(index * groups, (index + 1) * groups)
    return planes[:, inputs], scales[:, inputs] if scales.shape[1] > 1 else scales
