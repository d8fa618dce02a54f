"""Watching a forward pass: which modules are called with what, and what comes out."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexq.quantize.inputs import arguments, result_of, run
from flexq.quantize.layers import input_embeddings

_TOKENS = 7


@dataclass
class Call:
    """One module's call. Tensors stay alive, so that two are the same only if they are."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> torch.Tensor | None:
        if self.inputs and isinstance(self.inputs[0], torch.Tensor):
            return self.inputs[0]
        x = self.kwargs.get("hidden_states", self.kwargs.get("x"))
        return x if isinstance(x, torch.Tensor) else None

    @property
    def y(self) -> torch.Tensor | None:
        output = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return output if isinstance(output, torch.Tensor) else None


def probe_ids(model: nn.Module) -> torch.Tensor:
    """A few token ids [1, 7]. ValueError for a model without token embeddings."""
    weight = getattr(input_embeddings(model), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError("the model has no token embeddings")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, weight.shape[0], (1, _TOKENS), generator=generator)


def result(model: nn.Module) -> torch.Tensor:
    """The model's logits, or hidden states, for the probe, in float32."""
    with torch.inference_mode():
        return run(model, probe_ids(model)).float()


# What models call what they keep from one call to the next.
_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems")
_CACHED_TOKENS = 4


def cached_result(model: nn.Module) -> torch.Tensor | None:
    """The same for the probe's last tokens one by one after a cache of the others; None of a model that has none."""
    with torch.inference_mode():
        given = arguments(model, probe_ids(model))
        if "use_cache" not in given:
            return None
        given["use_cache"] = True
        side = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
        ids = given.pop(side)
        output, results = model(**given, **{side: ids[:, :_CACHED_TOKENS]}), []
        for step in ids[:, _CACHED_TOKENS:].split(1, dim=1):
            caches = {name: cache for name in _CACHES if (cache := getattr(output, name, None)) is not None}
            if not caches:
                return None
            output = model(**given, **caches, **{side: step})
            results.append(result_of(output).float())
        return torch.cat(results, dim=1)


def padded_result(model: nn.Module) -> torch.Tensor:
    """The same for a batch of two, the first of them padded on the left."""
    ids = probe_ids(model).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, : _TOKENS // 2] = 0
    with torch.inference_mode():
        given = arguments(model, ids)
        return result_of(model(**given, attention_mask=mask.to(given["input_ids"].device))).float()


def watch(model: nn.Module, run_once: Callable[[nn.Module], torch.Tensor] = result) -> list[Call]:
    """Every module's call in a forward pass, `result` or `padded_result`, in the order in which they began."""
    calls: list[Call] = []
    open_calls: dict[int, list[Call]] = defaultdict(list)
    handles = []

    def before(name: str):
        def hook(module, args, kwargs):
            call = Call(name, module, args, kwargs=kwargs)
            calls.append(call)
            open_calls[id(module)].append(call)

        return hook

    def after(module, args, kwargs, output):
        open_calls[id(module)].pop().output = output

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        run_once(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def once(calls: list[Call]) -> dict[str, Call]:
    """The calls of modules that were called exactly once, by name."""
    count: dict[str, int] = defaultdict(int)
    for call in calls:
        count[call.name] += 1
    return {call.name: call for call in calls if count[call.name] == 1}


def shared_inputs(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Layers that read the same tensor side by side, q/k/v or gate/up, in the order of `names`; others by themselves.

    Found by one forward pass over a few tokens; every layer by itself in a model that takes no token ids.

    Args:
        model: whose layers they are.
        names: of linear layers, or of anything else that is called with a tensor.
    """
    names = list(names)
    try:
        calls = once(watch(model))
    except (ValueError, TypeError, RuntimeError):
        return [[name] for name in names]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        call = calls.get(name)
        key = (name,) if call is None or call.x is None else (id(call.x), name.rpartition(".")[0])
        groups.setdefault(key, []).append(name)
    return list(groups.values())
