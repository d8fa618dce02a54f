"""`calibrate_model`: quantizes a model block by block, each on the inputs that the already quantized blocks give."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flexq import fisher
from flexq.blocks import Call, Reached, decoder_blocks, first_calls, placed
from flexq.linear import Linear
from flexq.patch import Progress, record_plan, replace_module, resolve_plan
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.rounding import Hessian, compensated_round

DEFAULT_WINDOWS = 16


def _stages(block: nn.Module, layers: dict[str, nn.Linear], call: Call) -> list[list[str]]:
    """The block's layers in the order in which they run, those that share an input together."""
    stages: list[list[str]] = []
    last: list[torch.Tensor | None] = [None]

    def record(name):
        def hook(_, args):
            if last[0] is not args[0]:
                stages.append([])
                last[0] = args[0]
            if not any(name in stage for stage in stages):
                stages[-1].append(name)

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for stage in stages for name in stage}
    return [*filter(None, stages), *([name] for name in layers if name not in reached)]


def _hessians(
    stage: dict[str, nn.Linear], block: nn.Module, calls: Sequence[Call], weights: dict[str, list[torch.Tensor]] | None
) -> dict[str, Hessian]:
    """Of the input that a stage's layers share, from every window, with each layer's own weights of tokens."""
    first = next(iter(stage))
    device = stage[first].weight.device
    names = [first] if weights is None else list(stage)
    hessians = {name: Hessian(stage[name].in_features, device) for name in names}
    inputs: list[torch.Tensor] = []

    def keep(_, args):
        inputs.append(args[0])
        raise Reached  # what comes after is not needed

    handle = stage[first].register_forward_pre_hook(keep)
    try:
        for index, call in enumerate(calls):
            with contextlib.suppress(Reached):
                call.run(block)
            while inputs:
                x = inputs.pop()
                for name, hessian in hessians.items():
                    of_tokens = None if weights is None else weights[name][index].to(device)
                    every = of_tokens is not None and len(of_tokens) == x.numel() // x.shape[-1]
                    hessian.add(x, of_tokens if every else None)  # an expert sees some of the tokens only
    except ValueError as error:
        raise ValueError(f"layer {first}: {error}") from None
    finally:
        handle.remove()
    return {name: hessians.get(name, hessians[first]) for name in stage}


class _Finished:
    """The blocks that an interrupted calibration has finished, a file each, in a folder of its own."""

    def __init__(self, folder: str | Path | None, about: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "calibration.json"
        if not note.exists():
            note.write_text(json.dumps(about, indent=2) + "\n")
        elif json.loads(note.read_text()) != about:
            raise ValueError(f"{folder} belongs to another calibration: other text, plan or weights; use a new folder")

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04}.safetensors"

    def all(self, blocks: int) -> bool:
        return self.folder is not None and all(self._file(block).exists() for block in range(blocks))

    def load(self, block: int) -> dict[str, torch.Tensor] | None:
        return load_file(self._file(block)) if self.folder is not None and self._file(block).exists() else None

    def save(self, block: int, layers: dict[str, Linear]) -> None:
        if self.folder is None:
            return
        tensors = {}
        for name, layer in layers.items():
            planes, scales = layer.canonical()
            tensors |= {f"{name}.qweight": planes.cpu().contiguous(), f"{name}.scales": scales.cpu().contiguous()}
        aside = self._file(block).with_suffix(".part")
        save_file(tensors, aside)
        aside.rename(self._file(block))  # whole or not there


def _fingerprint(model: nn.Module, windows: Sequence[torch.Tensor], resolved: dict[str, LayerConfig]) -> dict[str, Any]:
    """What decides a calibration's outcome."""
    text = zlib.crc32(torch.cat([w.flatten().cpu() for w in windows]).numpy().tobytes())
    sums = [model.get_submodule(name).weight.detach().double().sum().item() for name in resolved]
    return {
        "text": text,
        "plan": zlib.crc32(repr(sorted(resolved.items())).encode()),
        "weights": zlib.crc32(torch.tensor(sums, dtype=torch.float64).numpy().tobytes()),
    }


def calibrate_model(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    plan: Plan | str | dict[str, Any] = DEFAULT_RECIPE,
    include: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
    damping: float = 0.01,
    passes: int = 1,
    resume: str | Path | None = None,
    weigh_tokens: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Quantize the linear layers of a transformers model in place with compensated rounding, and return it.

    Block by block, and within a block layer by layer in the order in which they run, each is rounded for the inputs
    that everything before it gives once quantized. Tokens count by how much the model's output minds an error there
    (`flexq.fisher.token_weights`). If it fails or is interrupted, the model is left as it was.

    Args:
        model: on one device, the CPU or a GPU.
        windows: token ids, int64 [1, L] each, as `flexq.eval` cuts and spreads them; 16 of 2048 do well.
        plan, include, skip: as for `quantize_model`.
        progress: wraps the loop over windows that weighs tokens, then the one over layers, e.g. `tqdm.tqdm`.
        damping, passes: of `flexq.rounding.compensated_round`.
        resume: a folder that keeps each block as it is finished; with one from an interrupted run, those are not
            computed again. It is left there.
        weigh_tokens: takes a forward and backward pass of the unquantized model for each window, block by block too.
            Without, all tokens count the same.
        device: where blocks are worked on, each moved there and back, so that a model larger than a GPU's memory can
            be calibrated by it; None works on them where they are.

    Raises:
        ValueError: no windows, no stack of blocks, a plan that does not fit, or weights or inputs that are not finite
            (the message names the layer); a folder to resume from that belongs to another calibration.
    """
    if not windows:
        raise ValueError("calibration needs at least one window of text")
    resolved = resolve_plan(model, plan, include, skip)
    stack, blocks = decoder_blocks(model)
    where = None if device is None else torch.device(device)
    home = next(model.parameters()).device
    before: dict[str, nn.Linear] = {}
    steps: Iterator[str] = iter(())  # one a layer, whatever their order

    about = _fingerprint(model, windows, resolved) | {"weigh_tokens": weigh_tokens} if resume is not None else {}
    finished = _Finished(resume, about)

    def put(name: str, planes: torch.Tensor, scales: torch.Tensor) -> None:
        linear = before[name] = model.get_submodule(name)
        on = linear.weight.device
        replace_module(model, name, Linear.from_canonical(planes.to(on), scales.to(on), linear, resolved[name]))
        if where is not None:
            linear.to(home)  # the block goes back without it
        next(steps, None)

    def quantize(name: str, hessian: Hessian) -> None:
        try:
            rounded = compensated_round(model.get_submodule(name).weight, hessian, resolved[name], damping, passes)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        put(name, *rounded)

    try:
        weights = None
        if weigh_tokens and not finished.all(len(blocks)):
            weights = fisher.token_weights(model, windows, list(resolved), progress, where)
        steps = iter(progress(list(resolved)) if progress else resolved)
        with torch.no_grad():
            calls = first_calls(model, blocks, windows)
            if where is not None:
                calls = [call.to(where) for call in calls]
            for index, block in enumerate(blocks):
                prefix = f"{stack}.{index}."
                layers = {n: model.get_submodule(n) for n in resolved if n.startswith(prefix)}
                known = finished.load(index)
                with placed(block, where):
                    if known is not None:
                        for name in layers:
                            put(name, known[f"{name}.qweight"], known[f"{name}.scales"])
                    else:
                        for stage in _stages(block, layers, calls[0]) if layers else ():
                            hessians = _hessians({name: layers[name] for name in stage}, block, calls, weights)
                            for name, hessian in hessians.items():
                                quantize(name, hessian)
                        finished.save(index, {name: model.get_submodule(name) for name in layers})
                    calls = [call.after(block) for call in calls]
            for name in resolved:
                if name not in before:  # outside the stack: nothing is known of its inputs
                    linear = model.get_submodule(name)
                    quantize(name, Hessian(linear.in_features, linear.weight.device))
            next(steps, None)
    except BaseException:
        for name, linear in before.items():
            replace_module(model, name, linear)
        raise
    model.flexq_plan = record_plan(model, Plan.of(plan))
    tokens = sum(w.numel() for w in windows)
    model.flexq_plan.produced_by.update(
        {"rounding": "compensated", "calibration_tokens": tokens, "weighed_tokens": weigh_tokens}
    )
    return model
