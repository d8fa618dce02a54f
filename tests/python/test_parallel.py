"""Splitting weights over devices: the parts together are the whole."""

import pytest
import torch
from flexq import ops
from flexq.run.parallel import possible_splits, split_inputs, split_rows
from hypothesis import given, settings
from hypothesis import strategies as st

schemes = st.sampled_from(["group", "channel"])
widths = st.sampled_from([4, 5, 6, 8])


def weight(n: int, groups: int, scheme: str, seed: int, bits: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Any codes, and scales that are powers of two, so that sums of outputs are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(0, 256, (n, groups, bits, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(-3, 1, (n, groups if scheme == "group" else 1), generator=generator)
    return planes, torch.pow(2.0, exponents).half()


def linear(x, planes, scales, scheme) -> torch.Tensor:
    k = x.shape[1]
    packed = ops.prepack(planes, scales, k, scheme, "none")
    return torch.ops.flexq.linear(x, packed, None, planes.shape[0], 8, scheme, "none", planes.shape[2])


def codes(m: int, groups: int, scheme: str, seed: int) -> torch.Tensor:
    """Activations that are their own codes: each group (or part of a token) has a 127 in it, so a scale of 1."""
    x = torch.randint(-127, 128, (m, groups, 128), generator=torch.Generator().manual_seed(seed)).float()
    x[:, :, 5] = 127.0
    return x.reshape(m, -1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), schemes, widths, st.integers(0, 99))
def test_parts_sum_to_the_whole(m, n, groups_each, scheme, bits, seed):
    for parts in (2, 3):
        groups = groups_each * parts
        planes, scales = weight(n * parts, groups, scheme, seed, bits)
        x = codes(m, groups, scheme, seed)
        whole = linear(x, planes, scales, scheme)
        columns = [linear(x, *split_rows(planes, scales, parts, i), scheme) for i in range(parts)]
        assert torch.equal(torch.cat(columns, 1), whole)
        k = groups * 128
        inputs = x.chunk(parts, 1)
        rows = [linear(inputs[i], *split_inputs(planes, scales, k, parts, i), scheme) for i in range(parts)]
        assert torch.equal(sum(rows), whole)


@pytest.mark.parametrize(
    "k, parts, possible", [(576, 2, "1"), (768, 4, "1, 2, 3, 6"), (100, 3, "1"), (4096, 3, "1, 2, 4")]
)
def test_splits_inside_a_group_are_refused(k, parts, possible):
    planes, scales = weight(4, -(-k // 128), "group", 0)
    with pytest.raises(
        ValueError, match=f"{parts} devices cut its {k} inputs inside a group of 128; possible are {possible}"
    ):
        split_inputs(planes, scales, k, parts, 0)


def test_possible_splits():
    assert possible_splits(128) == [1]
    assert possible_splits(1024) == [1, 2, 4, 8]
    assert possible_splits(1000) == [1]


def test_rows_and_indices_are_checked():
    planes, scales = weight(5, 2, "group", 0)
    with pytest.raises(ValueError, match="5 rows cannot be split over 2"):
        split_rows(planes, scales, 2, 0)
    with pytest.raises(ValueError, match="index must be 0 to 1, got 2"):
        split_inputs(planes, scales, 256, 2, 2)
