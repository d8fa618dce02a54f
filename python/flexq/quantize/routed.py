"""Compensated rounding of experts, each on the tokens that a router sends it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.experts import gate
from flexq.plan import LayerConfig
from flexq.quantize.blocks import Reached
from flexq.quantize.experts import kind_of, positional, routed
from flexq.quantize.group import Group
from flexq.quantize.hessian import Hessian
from flexq.quantize.rounding import compensated_round, empty_codes

# An expert with fewer tokens than this share of a projection's input features leans on those of all experts: its own
# second moment says little about most directions.
_ENOUGH = 1 / 4
OWN, LEANING, NEAREST = "on_their_own_tokens", "leaning_on_all_tokens", "to_nearest"


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer are called with, from all of a text.

    Args:
        x: rows [R, H].
        ids: the experts [R, k] that each is for; an index of E or more is none.
        scales: the router's weights [R, k].
        weights: how much an error in each row counts, [R].
        halves: of the text that each row is from, 0 or 1, [R].
    """

    x: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor
    weights: torch.Tensor
    halves: torch.Tensor

    @classmethod
    def gather(
        cls, module: nn.Module, runs: Iterable[Callable[[], Any]], weights: Sequence[torch.Tensor] | None, group: Group
    ) -> "Routed":
        """From a process's runs of what calls the experts, each up to there, and weights of each one's tokens, or
        None."""
        calls: list[tuple[torch.Tensor, ...]] = []
        halves: list[int] = []
        half = 0

        def keep(_, args, kwargs):
            calls.append(routed(module, positional(module, args, kwargs)))
            halves.append(half)
            raise Reached

        device = module.down_proj.device
        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for at, run in enumerate(runs):
                half = group.half(at)
                with contextlib.suppress(Reached):
                    run()
        finally:
            handle.remove()
        if not calls:
            kind = kind_of(module)
            none = torch.zeros(0, 1, device=device)
            return cls(none.new_zeros(0, kind.desc.hidden), none.long(), none, none.flatten(), none.flatten())
        of_rows = []
        for index, (x, _, _) in enumerate(calls):
            tokens = torch.ones(1) if weights is None or len(weights) != len(calls) else weights[index]
            repeats = len(x) // len(tokens) if len(x) % len(tokens) == 0 else 0
            of_rows.append(tokens.to(device).repeat(repeats) if repeats else torch.ones(len(x), device=device))
        x, ids, scales = (torch.cat(each) for each in zip(*calls, strict=True))
        in_halves = [
            torch.full((len(rows),), half, device=device) for (rows, _, _), half in zip(calls, halves, strict=True)
        ]
        return cls(x, ids, scales, torch.cat(of_rows), torch.cat(in_halves))

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """An expert's rows [r, H], the router's weights [r, 1], the rows' own [r] and their halves [r]."""
        here = self.ids == expert
        rows = here.any(1)
        return self.x[rows], (self.scales * here).sum(1)[rows].unsqueeze(1), self.weights[rows], self.halves[rows]


def round_routed(
    module: nn.Module,
    projection: str,
    tokens: Routed,
    config: LayerConfig,
    damping: float,
    passes: int,
    group: Group,
) -> tuple[tuple[torch.Tensor, torch.Tensor], Counter]:
    """Planes and scales of a projection of all experts, and how many were rounded on what.

    Args:
        module: of experts in floating point.
        projection: its name.
        tokens: of `Routed.gather`.
        config: scheme and rotation.
        damping, passes: of `compensated_round`.
        group: processes that have tokens; each rounds a share of the experts.

    Raises:
        ValueError: weights or inputs that are not finite.
    """
    weight = kind_of(module).oriented(getattr(module, projection)).detach()
    experts, rows, k = weight.shape
    own = [(tokens.ids == expert).any(1).sum() for expert in range(experts)]
    counts = group.add_up(torch.stack(own)).tolist()
    enough = max(1, int(k * _ENOUGH))
    every = None
    if any(0 < count < enough for count in counts):
        every = Hessian(k, weight.device)
        for inputs in _inputs_of_all(module, projection, tokens):
            _add(every, *inputs)
        every.add_up(group)
    canonical, how = [], Counter()
    for expert, count in enumerate(counts):
        hessian = None
        if count > 0:
            hessian = Hessian(k, weight.device)
            _add(hessian, *_inputs(module, projection, tokens, expert))
            hessian.add_up(group)
        how[NEAREST if count == 0 else OWN if count >= enough else LEANING] += 1
        if not group.owns(expert):
            canonical.append(empty_codes(rows, k, config, weight.device))
        elif hessian is None:
            canonical.append(
                ops.quantize_weight(weight[expert].contiguous(), config.scheme, config.rotation, config.weight_bits)
            )
        else:
            blend = hessian if count >= enough else hessian.leaning_on(every, count / enough)
            canonical.append(compensated_round(weight[expert], blend, config, damping, passes))
    canonical = [[group.sent(t, expert) for t in codes] for expert, codes in enumerate(canonical)]
    planes, scales = zip(*canonical, strict=True)
    return (torch.stack(planes), torch.stack(scales)), how


# Inputs of a projection [r, K], in floating point, how much each counts, and the half of the text that it is from.
_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _add(hessian: Hessian, x: torch.Tensor, weights: torch.Tensor, halves: torch.Tensor) -> None:
    for half in range(2):
        rows = halves == half
        hessian.add(x[rows], weights[rows], half)


def _inputs(module: nn.Module, projection: str, tokens: Routed, expert: int) -> _Inputs:
    x, scale, weights, halves = tokens.of(expert)
    if projection == "gate_up_proj":
        return x, weights, halves
    kind = kind_of(module)
    gate_up = kind.oriented(module.gate_up_proj)[expert].float()
    u = x.float() @ gate_up.T
    u = u * scale if kind.weights_on_input else u
    u = u + module.gate_up_proj_bias[expert].float() if kind.bias else u
    return gate(kind.desc, u), weights, halves


def _inputs_of_all(module: nn.Module, projection: str, tokens: Routed) -> Iterator[_Inputs]:
    if projection == "gate_up_proj":
        rows = (tokens.ids < kind_of(module).desc.experts).any(1)
        yield tokens.x[rows], tokens.weights[rows], tokens.halves[rows]
        return
    for expert in tokens.ids.unique().tolist():
        if expert < kind_of(module).desc.experts:
            yield _inputs(module, projection, tokens, expert)
