"""What an error in a layer's output costs, from the gradients of the log likelihood there.

To second order, an error d in a layer's output for a token moves the model's next-token distributions by a KL
divergence of E[(g . d)^2] / 2, where g is the gradient of the log likelihood of tokens drawn from the model's own
distribution: the Fisher information of the output. Drawing them once a text is enough for averages over many tokens.
Hidden states of an encoder stand for tokens where it predicts none (outcome.py).
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.blocks import Call, Stack, decoder_stack, outline, starting_at, trace
from flexq.quantize.experts import module_of, positional
from flexq.quantize.group import Group
from flexq.quantize.outcome import outcome
from flexq.quantize.placement import Placement

# Given a layer's arguments and output in the forward pass, what to do with the gradient at the output in the backward
# pass. Arguments and output of a projection of experts are those of all of the experts.
Watcher = Callable[[tuple[torch.Tensor, ...], torch.Tensor], Callable[[torch.Tensor], None]]


def backward(
    model: nn.Module,
    window: torch.Tensor,
    watchers: dict[str, Watcher],
    seed: int,
    device: torch.device | None = None,
) -> int:
    """One forward and backward pass of a drawn outcome, block by block; returns how many there were.

    A block runs once without gradients and once more when its turn in the backward pass comes, so that no more than the
    hidden states between blocks and what a single block needs is held.

    Args:
        model: not quantized; its parameters get no gradient.
        window: token ids [1, L].
        watchers: by names of the model's linear layers, and projections of experts.
        seed: of the draw, which is the same on every device up to rounding.
        device: where blocks are run, each one moved there and back; None runs them where they are.
    """
    stack = decoder_stack(model)
    (count,) = _backward(model, stack, [(seed, window)], lambda _: watchers, Placement(device), lambda: None)
    return count


def _backward(
    model: nn.Module,
    stack: Stack,
    windows: Sequence[tuple[int, torch.Tensor]],
    watchers: Callable[[int], dict[str, Watcher]],
    placement: Placement,
    step: Callable[[], Any],
) -> list[int]:
    """`backward` of several windows, which go through a block one after the other while it is placed.

    Args:
        model, placement: whose weights are where.
        stack: of `decoder_stack`.
        windows: each with the seed of its draw.
        watchers: for each seed.
        step: called as a block is done, in the forward and in the backward pass.
    """
    required = [p for p in model.parameters() if p.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        forward = _Forward.run(model, stack, windows, placement, step)
        gradients, counts = placement.states(), []
        for at, (seed, window) in enumerate(windows):
            gradients[at], count = _from_outcome(model, stack, window, seed, watchers(seed), forward, at, placement)
            counts.append(count)
        for index in reversed(range(len(stack.blocks))):
            block = stack.blocks[index]
            with placement.placed(block):
                for at, (seed, _) in enumerate(windows):
                    inside = {n: w for n, w in watchers(seed).items() if stack.index_of(n) == index}
                    call = forward.call(at, index)
                    call = replace(call, hidden=call.hidden.detach().requires_grad_(True))
                    with torch.enable_grad(), _watched(model, inside):
                        output = call.run(block)
                        output.backward(gradients[at].to(output.device))
                    gradients[at] = call.hidden.grad
            step()
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
    return counts


@dataclass
class _Forward:
    """What a stack's blocks are called with in some windows, and what comes out of its last.

    Args:
        calls: by window and block, those of a stack that is outlined without their hidden states.
        rests: by window, of each block.
        hidden: by window and block, as many as there are and one more.
    """

    calls: list[list[Call]]
    rests: list[Sequence[tuple | None]]
    hidden: MutableMapping[tuple[int, int], torch.Tensor]

    @classmethod
    @torch.no_grad()
    def run(
        cls,
        model: nn.Module,
        stack: Stack,
        windows: Sequence[tuple[int, torch.Tensor]],
        placement: Placement,
        step: Callable[[], Any],
    ) -> "_Forward":
        hidden = placement.states()
        if stack.rests is None:
            traces = [trace(model, stack.blocks, window, placement.device) for _, window in windows]
            for at, traced in enumerate(traces):
                states = [*(call.hidden for call in traced.calls), traced.last]
                hidden.update({(at, index): state for index, state in enumerate(states)})
            for _ in stack.blocks:
                step()
            return cls([traced.calls for traced in traces], [traced.rests for traced in traces], hidden)
        calls = [outline(model, stack, window, placement.device) for _, window in windows]
        forward = cls(calls, [stack.rests] * len(windows), hidden)
        hidden.update({(at, 0): of_window[0].hidden for at, of_window in enumerate(calls)})
        for index, block in enumerate(stack.blocks):
            with placement.placed(block):
                for at in range(len(windows)):
                    hidden[at, index + 1] = forward.call(at, index).run(block)
            step()
        return forward

    def call(self, window: int, block: int) -> Call:
        return replace(self.calls[window][block], hidden=self.hidden[window, block])


def _from_outcome(
    model: nn.Module,
    stack: Stack,
    window: torch.Tensor,
    seed: int,
    watchers: dict[str, Watcher],
    forward: _Forward,
    at: int,
    placement: Placement,
) -> tuple[torch.Tensor, int]:
    """The gradient at the hidden state that leaves the last block, and the number of outcomes drawn."""
    last = len(stack.blocks)
    hidden = forward.hidden[at, last].to(placement.outside(model))
    outside = {name: watcher for name, watcher in watchers.items() if stack.index_of(name) is None}
    with (
        torch.enable_grad(),
        _watched(model, outside),
        starting_at(stack.blocks, last, hidden, forward.rests[at]),
    ):
        hidden.requires_grad_(True)
        predicted = outcome(model, window)
        predicted.log_likelihood(seed).backward()
    return hidden.grad, len(predicted)


@contextlib.contextmanager
def _watched(model: nn.Module, watchers: dict[str, Watcher]) -> Iterator[None]:
    def hook(watcher: Watcher):
        def watch(module, args, kwargs, output):
            with torch.no_grad():
                then = watcher(tuple(t.detach() for t in positional(module, args, kwargs)), output.detach())
            if output.requires_grad:  # else nothing that is watched for depends on it
                output.register_hook(then)

        return watch

    handles = [
        module_of(model, name).register_forward_hook(hook(watcher), with_kwargs=True)
        for name, watcher in watchers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_weights(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    names: Sequence[str],
    progress: Progress | None = None,
    placement: Placement | None = None,
    stack: Stack | None = None,
    group: Group | None = None,
) -> dict[str, list[torch.Tensor]]:
    """How much the model's output minds an error in each token's output of each layer.

    The mean square of the gradient at that output, in units of its mean over all tokens. A second moment of a layer's
    inputs in which tokens have these weights approximates the Hessian of the KL divergence, where one without is that
    of the layer's own squared error (GuidedQuant, arXiv 2505.07004, does so for groups of outputs).

    Args:
        model: not quantized.
        windows: token ids [1, L] each, of all processes.
        names: of linear layers and projections of experts.
        progress: wraps the loop over blocks, forward and backward.
        placement: where the model's weights are; in memory if None.
        stack: of `decoder_stack`, if it is known.
        group: processes that share the windows; None for this one alone.

    Returns:
        For each name, float32 [L] on the CPU for each of this process's windows; ones for a layer whose gradients are
        zero or not finite.
    """
    placement, stack, group = placement or Placement(), stack or decoder_stack(model), group or Group()
    numbered = group.mine(windows)
    weights: dict[str, list[torch.Tensor]] = {name: [torch.ones(w.numel()) for _, w in numbered] for name in names}
    place = {number: at for at, (number, _) in enumerate(numbered)}

    def into(name: str, index: int) -> Watcher:
        def keep(gradient: torch.Tensor) -> None:
            mean_square = gradient.float().square().mean(-1).flatten().cpu()
            tokens = len(weights[name][index])
            if len(mean_square) and len(mean_square) % tokens == 0:  # else an expert that sees some of the tokens
                weights[name][index] = mean_square.view(-1, tokens).mean(0)  # of every expert, where they have rows

        return lambda args, output: keep

    together = placement.together or len(numbered)
    parts = [numbered[i : i + together] for i in range(0, len(numbered), together)]
    todo = range(2 * len(stack.blocks) * len(parts))
    steps = iter(progress(todo) if progress else todo)
    for part in parts:
        _backward(
            model,
            stack,
            part,
            lambda number: {n: into(n, place[number]) for n in names},
            placement,
            lambda: next(steps, None),
        )
    next(steps, None)
    sums = torch.stack([torch.cat(each).sum() for each in weights.values()])
    sums = group.add_up(sums.to(placement.outside(model))).cpu()
    tokens = sum(window.numel() for window in windows)
    for mean, (name, each) in zip(sums / tokens, weights.items(), strict=True):
        usable = mean > 0 and torch.isfinite(mean)
        weights[name] = [w / mean if usable else torch.ones_like(w) for w in each]
    return weights
