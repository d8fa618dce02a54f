"""What an error in a layer's output costs, from the gradients of the log likelihood there.

To second order, an error d in a layer's output for a token moves the model's next-token distributions by a KL
divergence of E[(g . d)^2] / 2, where g is the gradient of the log likelihood of tokens drawn from the model's own
distribution: the Fisher information of the output. Drawing them once a text is enough for averages over many tokens.
Hidden states of an encoder stand for tokens where it predicts none (outcome.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.blocks import decoder_stack, placed, starting_at, trace
from flexq.quantize.experts import module_of, positional
from flexq.quantize.inputs import arguments
from flexq.quantize.outcome import outcome

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
    required = [p for p in model.parameters() if p.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            traced = trace(model, stack.blocks, window, device)
            hidden = traced.last.to(arguments(model, window)["input_ids"].device)
        outside = [name for name in watchers if stack.index_of(name) is None]
        last = len(stack.blocks)
        with (
            torch.enable_grad(),
            _watched(model, watchers, outside),
            starting_at(stack.blocks, last, hidden, traced.rests),
        ):
            hidden.requires_grad_(True)
            predicted = outcome(model, window)
            predicted.log_likelihood(seed).backward()
        gradient = hidden.grad
        for index in reversed(range(last)):
            block, call = stack.blocks[index], traced.calls[index]
            inside = [name for name in watchers if stack.index_of(name) == index]
            call = replace(call, hidden=call.hidden.detach().requires_grad_(True))
            with torch.enable_grad(), placed(block, device), _watched(model, watchers, inside):
                output = call.run(block)
                output.backward(gradient.to(output.device))
            gradient = call.hidden.grad
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
    return len(predicted)


@contextlib.contextmanager
def _watched(model: nn.Module, watchers: dict[str, Watcher], names: Sequence[str]) -> Iterator[None]:
    def hook(watcher: Watcher):
        def watch(module, args, kwargs, output):
            with torch.no_grad():
                then = watcher(tuple(t.detach() for t in positional(module, args, kwargs)), output.detach())
            if output.requires_grad:  # else nothing that is watched for depends on it
                output.register_hook(then)

        return watch

    handles = [module_of(model, name).register_forward_hook(hook(watchers[name]), with_kwargs=True) for name in names]
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
    device: torch.device | None = None,
) -> dict[str, list[torch.Tensor]]:
    """How much the model's output minds an error in each token's output of each layer.

    The mean square of the gradient at that output, in units of its mean over all tokens. A second moment of a layer's
    inputs in which tokens have these weights approximates the Hessian of the KL divergence, where one without is that
    of the layer's own squared error (GuidedQuant, arXiv 2505.07004, does so for groups of outputs).

    Args:
        model: not quantized.
        windows: token ids [1, L] each.
        names: of linear layers and projections of experts.
        progress: wraps the loop over windows.
        device: as for `backward`.

    Returns:
        For each name, float32 [L] on the CPU for each window; ones for a layer whose gradients are zero or not finite.
    """
    weights: dict[str, list[torch.Tensor]] = {name: [torch.ones(w.numel()) for w in windows] for name in names}

    def into(name: str, index: int) -> Watcher:
        def keep(gradient: torch.Tensor) -> None:
            mean_square = gradient.float().square().mean(-1).flatten().cpu()
            tokens = len(weights[name][index])
            if len(mean_square) and len(mean_square) % tokens == 0:  # else an expert that sees some of the tokens
                weights[name][index] = mean_square.view(-1, tokens).mean(0)  # of every expert, where they have rows

        return lambda args, output: keep

    for index, window in enumerate(progress(list(windows)) if progress else windows):
        backward(model, window, {name: into(name, index) for name in names}, index, device)
    for name, each in weights.items():
        mean = torch.cat(each).mean()
        usable = mean > 0 and torch.isfinite(mean)
        weights[name] = [w / mean if usable else torch.ones_like(w) for w in each]
    return weights
