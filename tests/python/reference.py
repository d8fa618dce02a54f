"""The numerics of docs/numerics.md in float64 PyTorch, written to be read, not to be fast."""

import torch

GROUP = 128


def hadamard(n: int = GROUP) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def groups_of(x: torch.Tensor, rotation: str) -> torch.Tensor:
    """[R, K] -> [R, G, 128] float64, zero-padded, rotated if asked."""
    rows, k = x.shape
    padded = torch.zeros(rows, -(-k // GROUP) * GROUP, dtype=torch.float64)
    padded[:, :k] = x.double()
    groups = padded.view(rows, -1, GROUP)
    return groups @ hadamard() if rotation == "hadamard128" else groups


def quantize_weight(weight: torch.Tensor, scheme: str, rotation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, 128 * G] and scales float16 [N, G] or [N, 1]."""
    groups = groups_of(weight, rotation)
    largest = groups.abs().amax(-1 if scheme == "group" else (1, 2), keepdim=scheme == "group")
    # Where no share leaves a scale above zero in fp16, scale and codes stay zero.
    best_error = torch.full(largest.shape, torch.inf, dtype=torch.float64)
    scales, codes = torch.zeros_like(largest), torch.zeros_like(groups)
    for share in (1, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85):
        stored = (largest / 31 * share).half().double().view(len(weight), -1, 1)
        rounded = torch.where(stored > 0, groups / stored, 0.0).round().clamp(-32, 31)
        error = (groups - rounded * stored).square().sum(-1 if scheme == "group" else (1, 2), keepdim=scheme == "group")
        better = (error.view_as(largest) < best_error) & (stored.view_as(largest) > 0)
        best_error = torch.where(better, error.view_as(largest), best_error)
        scales = torch.where(better, stored.view_as(largest), scales)
        codes = torch.where(better.view(len(weight), -1, 1), rounded, codes)
    scales = scales.half().view(len(weight), -1)
    return codes.to(torch.int8).view(len(weight), -1), scales


def quantize_activation(x: torch.Tensor, bits: int, scheme: str, rotation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, G, 128] and scales [M, G] or [M, 1], float64."""
    qmax = 31 if bits == 6 else 127
    groups = groups_of(x, rotation)
    largest = groups.abs().amax(-1 if scheme == "group" else (1, 2), keepdim=scheme == "group")
    scales = (largest / qmax).view(len(x), -1)
    stored = scales.unsqueeze(-1)
    return torch.where(stored > 0, groups / stored, 0.0).round().clamp(-qmax, qmax), scales


def product(
    a_codes: torch.Tensor, a_scales: torch.Tensor, w_codes: torch.Tensor, w_scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] in float64 from codes [M, Kp], [N, Kp] and scales, and the sum of its terms' magnitudes."""
    groups = w_codes.shape[1] // GROUP
    a = a_codes.double().view(len(a_codes), groups, GROUP) * a_scales.double().unsqueeze(-1)
    w = w_codes.double().view(len(w_codes), groups, GROUP) * w_scales.double().unsqueeze(-1)
    terms = torch.einsum("mgk,ngk->mng", a, w)
    return terms.sum(-1), terms.abs().sum(-1)
