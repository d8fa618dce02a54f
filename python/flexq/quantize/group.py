"""Processes that share a calibration's windows, each with the whole model's blocks in turn."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class Group:
    """Processes that do the same work on different windows; one alone where there is no process group.

    All of them make the same calls in the same order. Where one fails, what started them ends the others, as torchrun
    does.

    Args:
        processes: of `torch.distributed`, with a backend for the device that tensors are on; None for this one alone.
    """

    def __init__(self, processes: "distributed.ProcessGroup | None" = None):
        self._processes = processes
        self.size = 1 if processes is None else distributed.get_world_size(processes)
        self.rank = 0 if processes is None else distributed.get_rank(processes)

    def mine(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This process's share of some items, with their numbers."""
        return list(enumerate(items))[self.rank :: self.size]

    def half(self, at: int) -> int:
        """0 or 1: the half of all items, every second one, that this process's item at a place is in."""
        return (self.rank + at * self.size) % 2

    def owns(self, number: int) -> bool:
        """Whether a piece of work that one process does for all is this one's."""
        return number % self.size == self.rank

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self._processes)
        return tensor

    def total(self, value: float, device: torch.device) -> float:
        """The sum of all processes' numbers."""
        return value if self.size == 1 else self.add_up(torch.tensor(value, dtype=torch.float64, device=device)).item()

    def sent(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """A tensor as its owner has it; the others give one of the same shape and type, which is written to."""
        if self.size > 1:
            distributed.broadcast(tensor, group_src=number % self.size, group=self._processes)
        return tensor

    def first(self, value: Any) -> Any:
        """What the first process gives."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, group_src=0, group=self._processes)
        return values[0]

    def wait(self) -> None:
        """For all processes to come here."""
        if self.size > 1:
            distributed.barrier(group=self._processes)
