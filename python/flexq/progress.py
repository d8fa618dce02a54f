"""How long work shows how far it is."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps a sequence to show how far a loop over it is, as `tqdm.tqdm` does."""
