"""Passes of several windows through a model, all through a block before the next one runs."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from flexq.progress import Progress
from flexq.quantize.blocks import Call, Stack, outline, starting_at, trace
from flexq.quantize.inputs import arguments
from flexq.quantize.placement import Placement


class Calls(Sequence[Call]):
    """What a block is called with, for each window, its hidden state fetched when it is asked for.

    Args:
        of_windows: without their hidden states.
        hidden: by window.
    """

    def __init__(self, of_windows: Sequence[Call], hidden: Mapping[int, torch.Tensor]):
        self._of_windows, self._hidden = of_windows, hidden

    def __len__(self) -> int:
        return len(self._of_windows)

    def __getitem__(self, index: int) -> Call:
        return replace(self._of_windows[index], hidden=self._hidden[index])


class Ends:
    """The hidden states that leave stacks, so that the model runs on from there.

    Args:
        placement: of the model's weights.
        model: whose stacks they are.
    """

    def __init__(self, placement: Placement, model: nn.Module):
        self._placement, self._model = placement, model
        self._hidden: list[tuple[Stack, Mapping[int, torch.Tensor]]] = []

    def add(self, stack: Stack, hidden: Mapping[int, torch.Tensor]) -> None:
        """A stack's, by window."""
        if stack.rests is not None:
            self._hidden.append((stack, hidden))

    @contextlib.contextmanager
    def reached(self, window: int) -> Iterator[None]:
        """Forward passes of this window do not run the stacks."""
        outside = self._placement.outside(self._model)
        with contextlib.ExitStack() as skipped:
            for stack, hidden in self._hidden:
                last = hidden[window].to(outside)
                skipped.enter_context(starting_at(stack.blocks, len(stack.blocks), last, stack.rests))
            yield

    def run(self, window: int, ids: torch.Tensor) -> None:
        with self.reached(window):
            self._model(**arguments(self._model, ids))


@torch.no_grad()
def calls_of(
    model: nn.Module, stack: Stack, windows: Sequence[torch.Tensor], ends: Ends, placement: Placement
) -> list[list[Call]]:
    """What each block is called with for each window, the first one with its hidden state.

    Args:
        ends: of stacks that ran before.
    """
    if stack.rests is None:
        return [trace(model, stack.blocks, window, placement.device, first_only=True).calls for window in windows]
    calls = []
    for index, window in enumerate(windows):
        with ends.reached(index):
            calls.append(outline(model, stack, window, placement.device))
    return calls


@torch.no_grad()
def run_windows(
    model: nn.Module,
    stacks: Sequence[Stack],
    windows: Sequence[torch.Tensor],
    placement: Placement,
    progress: Progress | None,
) -> None:
    """Forward passes of the model, all windows through a block before the next one runs."""
    known = [stack for stack in stacks if stack.rests is not None]
    every = range(sum(len(stack.blocks) for stack in known))
    steps = iter(progress(every) if progress else every)
    ends = Ends(placement, model)
    for stack in known:
        of_windows = calls_of(model, stack, windows, ends, placement)
        hidden = placement.states()
        hidden.update({at: of_window[0].hidden for at, of_window in enumerate(of_windows)})
        for index, block in enumerate(stack.blocks):
            next(steps)
            with placement.placed(block):
                for at, call in enumerate(Calls([of_window[index] for of_window in of_windows], hidden)):
                    hidden[at] = call.run(block)
        ends.add(stack, hidden)
    next(steps, None)
    for at, window in enumerate(windows):
        ends.run(at, window)
