"""Calibrating a model from disk to disk, block by block."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flexq.checkpoint.convert import Conversion
from flexq.checkpoint.folder import require_free, work_folder
from flexq.checkpoint.offloaded import open_offloaded
from flexq.checkpoint.placeless import Placeless
from flexq.checkpoint.source import (
    ModelError,
    ModelSource,
    float_model,
    one_line,
    read_tensor,
)
from flexq.checkpoint.write import DEFAULT_SHARD_BYTES, write_model
from flexq.execution import resolve_device
from flexq.experts import ExpertWeights
from flexq.plan import DEFAULT_RECIPE, Plan
from flexq.progress import Progress
from flexq.quantize.calibrate import calibrate_placed
from flexq.quantize.embeddings import add_embedding, quantize_embedding
from flexq.quantize.equalize import equalize_placed
from flexq.quantize.finished import finished_tensors
from flexq.quantize.group import Group
from flexq.quantize.model import finish_quantized, resolve_plan
from flexq.quantize.offload import Offloaded
from flexq.quantize.report import coverage


def calibrate_checkpoint(
    source: str | Path | ModelSource,
    folder: str | Path,
    windows: Sequence[torch.Tensor],
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    resume: str | Path | None = None,
    weigh_tokens: bool = True,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    equalize: float = 0.0,
    states: str | Path | None = None,
    processes: "torch.distributed.ProcessGroup | None" = None,
) -> Plan:
    """`calibrate_model` from disk to disk, for models larger than memory: bit for bit what it gives in memory.

    The weights of one block at a time are in memory, or the embeddings' or the head's, with the hidden states of all
    windows and what rounding a layer takes, and in the end a shard of the checkpoint. With `weigh_tokens` the hidden
    states are those of every block.

    Args:
        source: as for `flexq.checkpoint.source.find_model`: a folder of safetensors, or a hub id.
        folder: the new checkpoint, whole or not there.
        windows: as for `calibrate_model`.
        plan: likewise.
        include: likewise.
        skip: likewise.
        shard_bytes: largest size of a file.
        overwrite: replace a FlexQ checkpoint that is there.
        progress: as for `calibrate_model`.
        resume: likewise.
        weigh_tokens: likewise.
        device: where everything runs.
        dtype: of what is not quantized; None keeps the source's.
        equalize: 0 to 1, the alpha of `flexq.quantize.equalize.equalize_model`, which runs first on the same windows;
            0 leaves it out.
        states: a folder in which hidden states are kept while they wait; None keeps them in memory.
        processes: a group of processes, with a backend for `device`, that call this with the same arguments but for
            `device` and share the windows and the rounding; the first of them writes. The result is that of one
            process, up to the rounding of sums.

    Returns:
        The plan as it was carried out. A warning names the largest weights that are left, if they are many.

    Raises:
        ModelError, ValueError: the source cannot be read, or a block at a time, or as `calibrate_model` says; nothing
            is left behind.
        OSError: something is in the way at `folder`, or the disk is full; nothing is left behind.
    """
    source = float_model(source)
    require_free(folder, overwrite, source.folder)
    states = None if states is None else Path(states)
    model, offloaded = open_offloaded(source, resolve_device(device), states)
    resolve_plan(model, plan, include, skip)  # what is wrong with it is said before the work begins
    group, made = Group(processes), {}
    if equalize:
        with weights_where_they_are_read(model):
            made["equalized"] = equalize_placed(offloaded, model, windows, equalize, dtype, progress, group).to_dict()
    done = calibrate_offloaded(
        source, model, offloaded, folder, windows, plan, include, skip, shard_bytes, overwrite, progress, resume,
        weigh_tokens, dtype, made, group,
    )  # fmt: skip
    if done.coverage.warning:
        warnings.warn(done.coverage.warning, stacklevel=2)
    return done.plan


def calibrate_offloaded(
    source: ModelSource,
    model,
    offloaded: Offloaded,
    folder: str | Path,
    windows: Sequence[torch.Tensor],
    plan: Plan | str | dict[str, Any],
    include: Sequence[str] | None,
    skip: Sequence[str],
    shard_bytes: int,
    overwrite: bool,
    progress: Progress | None,
    resume: str | Path | None,
    weigh_tokens: bool,
    dtype: torch.dtype | None,
    made: dict[str, Any],
    group: Group,
) -> Conversion:
    """`calibrate_checkpoint` of what `open_offloaded` has opened, with all that can be said of it; `made` goes into the
    plan's `produced_by`."""
    plan = Plan.of(plan)
    resolved, embedding = resolve_plan(model, plan, include, skip)
    placeless = Placeless.in_source(source)  # before the long work, as it may fail
    with _finished_blocks(Path(folder), resume, group) as finished, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller says it
        with weights_where_they_are_read(model):
            record = calibrate_placed(
                offloaded, model, windows, resolved, progress, resume=resume, weigh_tokens=weigh_tokens, keep=finished,
                group=group,
            )  # fmt: skip
        if embedding is not None:
            weight = offloaded.read([f"{embedding}.weight"])[f"{embedding}.weight"]
            add_embedding(
                model, embedding, *quantize_embedding(embedding, model.get_submodule(embedding), weight), record
            )
        finish_quantized(model, plan, **record, source=source.name, **made)
        sizes = None
        if group.rank == 0:
            reader = _Result(model, offloaded, finished)
            sizes = write_model(
                model, folder, None, shard_bytes, overwrite, source.folder, dtype, reader.read, placeless.beside
            )
        sizes = group.first(sizes)
    return Conversion(model.flexq_plan, coverage(model), sizes, placeless)


@contextlib.contextmanager
def weights_where_they_are_read(model) -> Iterator[None]:
    """ModelError instead of PyTorch's errors for a model that meets weights which are not there."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise ModelError(
            f"{type(model).__name__} reads weights outside the modules that they are of, so that it cannot be "
            f"calibrated a block at a time; load it whole ({one_line(error)})"
        ) from None


@contextlib.contextmanager
def _finished_blocks(folder: Path, resume: str | Path | None, group: Group) -> Iterator[Path]:
    """Where finished blocks are kept: the folder to resume from, or one beside the checkpoint that goes at the end."""
    if resume is not None:
        yield Path(resume)
    elif group.rank > 0:
        yield group.first(None)
    else:
        with work_folder(folder) as blocks:
            yield group.first(blocks)


class _Result:
    """The calibrated model's tensors by their names in its `state_dict`: quantized ones from finished blocks."""

    def __init__(self, model, offloaded: Offloaded, finished: str | Path):
        self._model, self._offloaded, self._files = model, offloaded, finished_tensors(Path(finished))

    def read(self, name: str) -> torch.Tensor:
        if name in self._files:
            return read_tensor(self._files[name], name)
        layer, _, kind = name.rpartition(".")
        of_experts = isinstance(self._model.get_submodule(layer), ExpertWeights)
        key = f"{layer}_{kind}" if of_experts else name  # in floating point
        return self._offloaded.read([key])[key]
