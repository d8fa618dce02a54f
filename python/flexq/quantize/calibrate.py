"""`calibrate_model`: quantizes a model block by block, each on the inputs that the already quantized blocks give."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.experts import Experts
from flexq.linear import Linear
from flexq.plan import DEFAULT_RECIPE, LayerConfig, Plan
from flexq.progress import Progress
from flexq.quantize import fisher
from flexq.quantize.blocks import Call, Reached, Stack, bypassed, stacks_of
from flexq.quantize.embeddings import add_embedding, quantize_embedding
from flexq.quantize.experts import PROJECTIONS, kind_of, module_of, positional, replacement, whole_of
from flexq.quantize.finished import Finished, fingerprint
from flexq.quantize.group import Group
from flexq.quantize.hessian import Hessian
from flexq.quantize.inputs import predicts_tokens
from flexq.quantize.layers import as_linear, identity, replace_module, warn_of_hooks
from flexq.quantize.model import finish_quantized, require_in_memory, resolve_plan
from flexq.quantize.passes import Calls, Ends, calls_of
from flexq.quantize.placement import Placement
from flexq.quantize.rounding import compensated_round, empty_codes
from flexq.quantize.routed import Routed, round_routed

DEFAULT_WINDOWS = 16
# Of layers whose Hessians are gathered at the same time, where a model cannot be worked on block by block.
_HESSIAN_BYTES = 1 << 30


def _stages(block: nn.Module, layers: dict[str, nn.Module], call: Call) -> list[list[str]]:
    """The block's layers in the order in which they run, those that share an input together; experts by themselves."""
    stages: list[list[str]] = []
    last: list[torch.Tensor | None] = [None]

    def record(name):
        def hook(module, args, kwargs):
            x = positional(module, args, kwargs)[0]
            alone = kind_of(module) is not None
            if alone or last[0] is not x:
                stages.append([])
                last[0] = None if alone else x
            if not any(name in stage for stage in stages):
                stages[-1].append(name)

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for stage in stages for name in stage}
    return [*filter(None, stages), *([name] for name in layers if name not in reached)]


def _hessian(layer: nn.Module) -> Hessian:
    linear = as_linear(layer)
    return Hessian(linear.in_features, linear.weight.device)


def _hessians(
    stage: dict[str, nn.Module],
    block: nn.Module,
    calls: Sequence[Call],
    weights: dict[str, list[torch.Tensor]] | None,
    group: Group,
) -> dict[str, Hessian]:
    """Of the input that a stage's layers share, from every window, with each layer's own weights of tokens."""
    first = next(iter(stage))
    device = stage[first].weight.device
    names = [first] if weights is None else list(stage)
    hessians = {name: _hessian(stage[name]) for name in names}
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
                    # An expert sees some of the tokens only.
                    hessian.add(x, of_tokens if every else None, group.half(index))
    except ValueError as error:
        raise ValueError(f"layer {first}: {error}") from None
    finally:
        handle.remove()
    for hessian in hessians.values():
        hessian.add_up(group)
    return {name: hessians.get(name, hessians[first]) for name in stage}


def _hessians_outside(
    placement: Placement, layers: dict[str, nn.Module], runs: Callable[[], Iterable[Callable[[], Any]]], group: Group
) -> Iterator[tuple[str, Hessian]]:
    """Of layers anywhere in the model, from runs of all that is outside blocks, a few layers at a time."""
    half = 0

    def add(hessian: Hessian):
        return lambda module, args: hessian.add(args[0], half=half)

    waiting = list(layers)
    while waiting:
        hessians: dict[str, Hessian] = {}
        size = 0
        while waiting and (not hessians or size < _HESSIAN_BYTES):
            name = waiting.pop(0)
            with placement.present(layers[name]):
                hessians[name] = _hessian(layers[name])
            size += hessians[name].sums.nbytes
        with contextlib.ExitStack() as hooks:
            for name, hessian in hessians.items():
                hooks.callback(layers[name].register_forward_pre_hook(add(hessian)).remove)
            for at, run_once in enumerate(runs()):
                half = group.half(at)
                run_once()
        for hessian in hessians.values():
            hessian.add_up(group)
        yield from hessians.items()


class _Work:
    """The state of a calibration: what is to be done, what has been, and how to take it back."""

    def __init__(
        self, model: nn.Module, resolved: dict[str, LayerConfig], damping: float, passes: int, group: Group, step
    ):
        self.model, self.resolved, self.damping, self.passes, self.step = model, resolved, damping, passes, step
        self.group = group
        self.wholes = {n: whole_of(n) for n in resolved if kind_of(module_of(model, n)) is not None}
        self.before: dict[str, nn.Module] = {}
        self.vanished = 0
        self.experts = Counter()  # how many were rounded how

    def modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """The modules that compute these layers and are still in floating point; experts under their own name."""
        places = dict.fromkeys(self.wholes.get(name, name) for name in names)
        return {place: self.model.get_submodule(place) for place in places if place not in self.before}

    def configs(self, whole: str) -> tuple[LayerConfig, LayerConfig]:
        gate_up, down = (self.resolved[f"{whole}.{p}"] for p in PROJECTIONS)
        return gate_up, down

    def put(self, name: str, planes: torch.Tensor, scales: torch.Tensor) -> None:
        """A layer's codes into its place, and into others where the same module stands."""
        module = self.model.get_submodule(name)
        linear, config = as_linear(module), self.resolved[name]
        on = linear.weight.device
        self.vanished += ops.count_vanished(linear.weight, scales)
        layer = Linear.from_canonical(planes.to(on), scales.to(on), linear, config)
        for other, settings in self.resolved.items():
            if other not in self.wholes and settings == config:
                self._replace(other, module, layer)

    def put_experts(self, whole: str, canonical: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The same for experts, and planes and scales of each projection."""
        module, configs = self.model.get_submodule(whole), self.configs(whole)
        for projection, (_, scales) in zip(PROJECTIONS, canonical, strict=True):
            weight = kind_of(module).oriented(getattr(module, projection))
            self.vanished += sum(map(ops.count_vanished, weight, scales))
        on = module.down_proj.device
        experts = replacement(module, *((planes.to(on), scales.to(on)) for planes, scales in canonical), configs)
        for other in dict.fromkeys(self.wholes.values()):
            if self.configs(other) == configs:
                self._replace(other, module, experts)

    def _replace(self, place: str, module: nn.Module, by: nn.Module) -> None:
        if place not in self.before and identity(self.model.get_submodule(place)) == identity(module):
            self.before[place] = module
            replace_module(self.model, place, by)
            for _ in PROJECTIONS if isinstance(by, Experts) else (place,):
                self.step()

    def quantize(self, hessians: dict[str, Hessian]) -> None:
        """Layers, each rounded by one of the processes."""
        todo = {name: hessian for name, hessian in hessians.items() if name not in self.before}
        codes = {
            name: self._rounded(name, hessian) if self.group.owns(number) else self._empty(name)
            for number, (name, hessian) in enumerate(todo.items())
        }
        for number, (name, (planes, scales)) in enumerate(codes.items()):
            planes, scales = self.group.sent(planes, number), self.group.sent(scales, number)
            if name not in self.before:
                self.put(name, planes, scales)

    def _rounded(self, name: str, hessian: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        weight = as_linear(self.model.get_submodule(name)).weight
        try:
            return compensated_round(weight, hessian, self.resolved[name], self.damping, self.passes)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None

    def _empty(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = as_linear(self.model.get_submodule(name)).weight
        return empty_codes(*weight.shape, self.resolved[name], weight.device)

    def quantize_experts(
        self, whole: str, runs: Iterable[Callable[[], Any]], weights: dict[str, list[torch.Tensor]] | None
    ) -> None:
        """Experts, each with the tokens that it is sent in some runs of what calls them."""
        if whole in self.before:
            return
        module = self.model.get_submodule(whole)
        of_tokens = None if weights is None else weights[f"{whole}.down_proj"]
        tokens = Routed.gather(module, runs, of_tokens, self.group)
        canonical = []
        for projection, config in zip(PROJECTIONS, self.configs(whole), strict=True):
            try:
                rounded, how = round_routed(module, projection, tokens, config, self.damping, self.passes, self.group)
            except ValueError as error:
                raise ValueError(f"layer {whole}.{projection}: {error}") from None
            canonical.append(rounded)
            self.experts += how
        self.put_experts(whole, canonical)

    def undo(self) -> None:
        for name, module in self.before.items():
            replace_module(self.model, name, module)


def _calibrate_stack(
    work: _Work,
    stack: Stack,
    windows: Sequence[torch.Tensor],
    weights: dict[str, list[torch.Tensor]] | None,
    finished: Finished,
    first_block: int,
    placement: Placement,
    ends: Ends,
) -> None:
    """Blocks one after the other, each on what the quantized ones before it give."""
    of_windows = calls_of(work.model, stack, windows, ends, placement)
    hidden = placement.states()
    hidden.update({at: of_window[0].hidden for at, of_window in enumerate(of_windows)})
    for index, block in enumerate(stack.blocks):
        names = [n for n in work.resolved if stack.index_of(n) == index]
        calls = Calls([of_window[index] for of_window in of_windows], hidden)
        known = finished.load(first_block + index, names)
        with placement.placed(block):
            modules = work.modules(names)
            if known is not None:
                _put_known(work, modules, *known)
            else:
                before = Counter(work.experts)
                _calibrate_block(work, block, modules, calls, weights)
                layers = {name: work.model.get_submodule(name) for name in names}
                if work.group.rank == 0:
                    finished.save(first_block + index, layers, work.experts - before)
            for at, call in enumerate(calls):
                hidden[at] = call.run(block)
    ends.add(stack, hidden)


def _calibrate_outside(work: _Work, windows: Sequence[torch.Tensor], ends: Ends, placement: Placement) -> None:
    """What is in no block: the LM head, or all layers of a model that has no stacks."""
    outside = work.modules(work.resolved)

    def runs() -> Iterator[Callable[[], None]]:
        return (functools.partial(ends.run, at, ids) for at, ids in enumerate(windows))

    linear = {name: module for name, module in outside.items() if kind_of(module) is None}
    for name, hessian in _hessians_outside(placement, linear, runs, work.group):
        with placement.present(linear[name]):
            work.quantize({name: hessian})
    for name in outside.keys() - linear.keys():
        with placement.present(outside[name]):
            work.quantize_experts(name, runs(), None)


def _put_known(work: _Work, modules: dict[str, nn.Module], tensors: dict[str, torch.Tensor], experts: Counter) -> None:
    def canonical(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"]

    for place, module in modules.items():
        if place in work.before:
            continue
        if kind_of(module) is None:
            work.put(place, *canonical(place))
        else:
            work.put_experts(place, [canonical(f"{place}.{p}") for p in PROJECTIONS])
    work.experts += experts


def _calibrate_block(
    work: _Work,
    block: nn.Module,
    modules: dict[str, nn.Module],
    calls: Sequence[Call],
    weights: dict[str, list[torch.Tensor]] | None,
) -> None:
    for stage in work.group.first(_stages(block, modules, calls[0])) if modules else ():
        todo = {name: modules[name] for name in stage if name not in work.before}
        first = next(iter(todo), None)
        if first is None:
            continue
        if kind_of(todo[first]) is not None:
            work.quantize_experts(first, (functools.partial(call.run, block) for call in calls), weights)
            continue
        work.quantize(_hessians(todo, block, calls, weights, work.group))


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
    """Quantize the linear layers and experts of a transformers model in place with compensated rounding, and return it.

    Decoders, encoders and encoder-decoders that read text; each block runs with its own arguments (masks, rotary
    embeddings). Where blocks run more than once (ALBERT), all layers are rounded on what the unquantized model gives.
    Each expert is rounded on the tokens that the router sends it. One with few of them leans on all tokens of its
    layer, one with none is rounded to nearest; `produced_by["experts"]` of the plan counts them, by projections.
    A token embedding that the plan quantizes is rounded to nearest in the end.
    If anything goes wrong, the model is left as it was.

    Args:
        model: not quantized, in memory.
        windows: token ids, int64 [1, L] each, as `flexq.evaluate.text` cuts and spreads them; 16 of 2048 do well.
        plan: as for `quantize_model`.
        include: likewise.
        skip: likewise.
        progress: wraps the loop over blocks that weighs tokens, then the one over layers, e.g. `tqdm.tqdm`.
        damping: of `flexq.quantize.rounding.compensated_round`.
        passes: likewise.
        resume: a folder that keeps each block as it is finished; with one from an interrupted run, those are not
            computed again. It is left there.
        weigh_tokens: takes a forward and backward pass of the unquantized model for each window, block by block too.
            Without, or of a model that predicts no tokens, all tokens count the same.
        device: where blocks are worked on, each moved there and back, so that a model larger than a GPU's memory can
            be calibrated by it; None works on them where they are.

    Raises:
        ValueError: no windows, a model that reads no text, a plan that does not fit, or weights or inputs that are not
            finite (the message names the layer); a folder to resume from that belongs to another calibration.
    """
    plan = Plan.of(plan)
    resolved, embedding = resolve_plan(model, plan, include, skip)
    warn_of_hooks(model, resolved)
    for name in (*resolved, *filter(None, [embedding])):
        require_in_memory(name, module_of(model, name))
    quantized = None if embedding is None else quantize_embedding(embedding, model.get_submodule(embedding))
    record = calibrate_placed(
        Placement(device), model, windows, resolved, progress, damping, passes, resume, weigh_tokens
    )
    if quantized is not None:
        add_embedding(model, embedding, *quantized, record)
    return finish_quantized(model, plan, **record)


def calibrate_placed(
    placement: Placement,
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    resolved: dict[str, LayerConfig],
    progress: Progress | None = None,
    damping: float = 0.01,
    passes: int = 1,
    resume: str | Path | None = None,
    weigh_tokens: bool = True,
    keep: str | Path | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """`calibrate_model` of a model whose weights are as `placement` says, with the settings of each layer that
    `resolve_plan` gives, by processes that share the windows; returns what the plan is to say of how it was made.

    Finished blocks are kept in the folder to resume from, or in an empty one, `keep`, from which nothing is resumed.
    """
    group = group or Group()
    if not windows:
        raise ValueError("calibration needs at least one window of text")
    if len(windows) < group.size:
        raise ValueError(f"{group.size} processes share {len(windows)} windows of text; give at least as many windows")
    stacks = stacks_of(model)
    placement.check(model, stacks, resolved)
    with bypassed(stacks):
        weigh_tokens = weigh_tokens and bool(stacks) and predicts_tokens(model)
    about = {}
    if resume is not None:
        about = fingerprint(
            placement.tensors(model),
            windows,
            resolved,
            weigh_tokens=weigh_tokens,
            damping=damping,
            passes=passes,
            version=3,
        )
    if group.rank > 0:
        group.wait()
    finished = Finished(keep if resume is None else resume, about)
    if group.rank == 0:
        group.wait()
    steps: Iterator[str] = iter(())  # one a layer, whatever their order
    work = _Work(model, resolved, damping, passes, group, lambda: next(steps, None))
    try:
        blocks = [(s, i) for s in stacks for i in range(len(s.blocks))]
        in_block = [[n for n in resolved if s.index_of(n) == i] for s, i in blocks]
        complete = bool(blocks) and all(finished.load(i, names) is not None for i, names in enumerate(in_block))
        weights = None
        if weigh_tokens and not complete:
            weights = fisher.token_weights(model, windows, list(resolved), progress, placement, stacks[-1], group)
        steps = iter(progress(list(resolved)) if progress else resolved)
        ends, own = Ends(placement, model), [window for _, window in group.mine(windows)]
        with torch.no_grad():
            first_block = 0
            for stack in stacks:
                _calibrate_stack(work, stack, own, weights, finished, first_block, placement, ends)
                first_block += len(stack.blocks)
            _calibrate_outside(work, own, ends, placement)
        next(steps, None)
    except BaseException:
        work.undo()
        raise
    record = {
        "rounding": "compensated",
        "calibration_tokens": sum(w.numel() for w in windows),
        "weighed_tokens": weigh_tokens,
    }
    if work.experts:
        record["experts"] = dict(work.experts)
    if work.vanished:
        record["vanished_scales"] = work.vanished
    return record
