"""The numerics of docs/how-it-works/numerics.md in float64 PyTorch, written to be read, not to be fast."""

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


# Shares of absmax / the largest code that a scale may be, by weight bits.
SHARES = {
    4: (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55),
    5: (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    6: (1, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85),
    8: (1, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85),
}


def quantize_weight(
    weight: torch.Tensor, scheme: str, rotation: str, bits: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, 128 * G] and scales float16 [N, G] or [N, 1]."""
    top = 2 ** (bits - 1) - 1
    groups = groups_of(weight, rotation)
    largest = groups.abs().amax(-1 if scheme == "group" else (1, 2), keepdim=scheme == "group")
    # Where no share leaves a scale above zero in fp16, scale and codes stay zero.
    best_error = torch.full(largest.shape, torch.inf, dtype=torch.float64)
    scales, codes = torch.zeros_like(largest), torch.zeros_like(groups)
    for share in SHARES[bits]:
        stored = (largest / top * share).half().double().view(len(weight), -1, 1)
        rounded = torch.where(stored > 0, groups / stored, 0.0).round().clamp(-top - 1, top)
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


def gated(u: torch.Tensor, dtype: torch.dtype, function, alpha, limit, up_offset, interleaved) -> torch.Tensor:
    """h [P, I] of gate and up values [P, 2I], each step rounded to `dtype`; float64."""

    def rounded(x):
        return x.to(dtype).double()

    gate, up = (u[:, 0::2], u[:, 1::2]) if interleaved else u.chunk(2, 1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if function == "silu":
        activated = gate * torch.sigmoid(alpha * gate)
    else:
        activated = torch.nn.functional.gelu(gate, approximate="tanh" if function == "gelu_tanh" else "none")
    return rounded(rounded(activated) * rounded(up + up_offset))


def experts(x_codes, x_scales, ids, weights, gate_up, down, biases, dtype, desc, on_input):
    """y [M, H] in float64, the sum of its terms' magnitudes, and what values of h add or take that are so close to the
    border between two codes that fp32 may put them on its other side; as docs/how-it-works/numerics.md has
    it. `gate_up` and `down` are codes [E, N, Kp] and scales [E, N, ...], `biases` are [E, N] or None, `ids` below 0 are
    not here."""
    y = torch.zeros(len(ids), desc.hidden, dtype=torch.float64)
    magnitude, doubt = torch.zeros_like(y), torch.zeros_like(y)
    for token, k in ((ids >= 0).nonzero()).tolist():
        expert, weight = ids[token, k], weights[token, k].double()
        u, _ = product(x_codes[token : token + 1], x_scales[token : token + 1], *(t[expert] for t in gate_up))
        u = u * weight if on_input else u
        u = u if biases[0] is None else u + biases[0][expert].double()
        h = gated(u.to(dtype).double(), dtype, *desc[9:14])
        codes, scales = quantize_activation(h, desc.down_act_bits, desc.down_scheme, desc.down_rotation)
        term, size = product(codes.flatten(1), scales, *(t[expert] for t in down))
        if biases[1] is not None:
            term, size = term + biases[1][expert].double(), size + biases[1][expert].double().abs()
        factor = 1.0 if on_input else weight
        y[token] += factor * term[0]
        magnitude[token] += abs(factor) * size[0]
        exact = groups_of(h, desc.down_rotation) / scales.unsqueeze(-1).clamp(min=1e-300)
        close = ((exact.abs() % 1 - 0.5).abs() < 1e-3).double()
        doubt[token] += abs(factor) * product(close.flatten(1), scales, down[0][expert].abs(), down[1][expert])[0][0]
    return y, magnitude, doubt
