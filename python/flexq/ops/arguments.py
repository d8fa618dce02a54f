"""Tensors and settings as arguments of the C API: what they must be, and where they are."""

import functools

import torch

from flexq import _core

GROUP_SIZE = _core.GROUP_SIZE
WEIGHT_BITS = (4, 5, 6, 8)
# Of activations, by their numbers in the C API.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.lru_cache(maxsize=4096)
def weight_desc(n: int, k: int, scheme: str, rotation: str, weight_bits: int) -> _core.WeightDesc:
    return _core.WeightDesc(n, k, scheme, rotation, weight_bits)


@functools.lru_cache(maxsize=4096)
def activation_desc(m: int, k: int, act_bits: int, scheme: str, rotation: str) -> _core.ActivationDesc:
    return _core.ActivationDesc(m, k, act_bits, scheme, rotation)


def num_groups(k: int) -> int:
    return -(-k // GROUP_SIZE)


def num_scales(k: int, scheme: str) -> int:
    return num_groups(k) if scheme == "group" else 1


def empty_bytes(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def dtype_of(name: str, dtype: torch.dtype) -> int:
    try:
        return DTYPES[dtype]
    except KeyError:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}") from None


def buffer(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of a uint8 tensor."""
    if tensor.dtype != torch.uint8 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous uint8, got {tensor.dtype} with strides {list(tensor.stride())}")
    return tensor.data_ptr(), tensor.numel()


def matrix(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [..., K] as a tensor with contiguous rows (copied only if it has none), its number of rows and their stride."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., K] with K at least 1, got {list(x.shape)}")
    k = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // k, k
    try:
        rows = x.view(-1, k)
    except RuntimeError:
        rows = x
    if rows.dim() == 2 and rows.stride(1) == 1 and rows.stride(0) >= k:
        return rows, rows.shape[0], rows.stride(0)
    return x.contiguous(), x.numel() // k, k
