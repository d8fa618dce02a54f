"""`fuse_model`: fewer, larger operations between the GEMMs of a quantized model, found by what its layers do.

One forward pass over a few tokens, watched by hooks (tracing.py), shows which layers share an input, which norm
produced it and what becomes of their outputs; no class or attribute name is asked for. Then, step by step,

- layers with one input and the same settings become one GEMM over their rows (merging.py: q/k/v, gate/up), their input
  quantized once;
- gate/up/down MLPs with a SiLU quantize `silu(gate) * up` in one kernel (fusing.py);
- RMS norms, and the sum with the residual before them, are one kernel with the quantization of what they feed.

Each step is kept only if the model's logits stay what they were, of models that return a cache also token by token
after one; a model that is not understood runs as it did.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from flexq.linear import Linear
from flexq.quantize.layers import input_embeddings
from flexq.quantize.tracing import Call, once, watch
from flexq.run import fusing
from flexq.run.merging import merge, unmerge

# How far a sound step may move the logits, of their norm: three times as far as the embeddings' last bit does, which a
# deep W6A6 model answers with other codes in all later layers. A step that is wrong moves them by their own size.
_LEAST_TOLERANCE, _MOST_TOLERANCE = 0.02, 0.3


@dataclass
class Fusion:
    """What `fuse_model` did, by name, and how to take it back."""

    merged: list[list[str]] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    kernels: bool = True

    def __str__(self) -> str:
        parts = sum(len(names) for names in self.merged if len(names) > 1)
        whole = sum(len(names) > 1 for names in self.merged)
        return (
            f"{parts} layers merged into {whole}, {len(self.mlps)} MLPs, {len(self.norms)} norms and "
            f"{len(self.layers)} residual sums fused"
        )


@dataclass(frozen=True)
class _Step:
    take: Callable[[nn.Module, dict[str, Call], Fusion], None]
    take_back: Callable[[nn.Module, Fusion], None]


def _merge(model: nn.Module, calls: dict[str, Call], fusion: Fusion) -> None:
    # A single layer too, if a norm can feed it or it is an MLP's gate and up in one.
    normed = {id(call.y) for call in calls.values() if fusing.rms_eps(call) is not None}
    halves = {call.name for call in calls.values() if fusing.is_gate_up(call, calls)}
    merge(model, calls, halves, normed, fusion.merged)


_STEPS = (
    _Step(_merge, lambda model, fusion: unmerge(model, fusion.merged)),
    _Step(
        lambda model, calls, fusion: fusing.fuse_mlps(calls, fusion.mlps),
        lambda model, fusion: fusing.unpatch(model, fusion.mlps),
    ),
    _Step(
        lambda model, calls, fusion: fusing.fuse_norms(model, calls, fusion.norms),
        lambda model, fusion: fusing.unpatch(model, fusion.norms),
    ),
    _Step(
        lambda model, calls, fusion: fusing.fuse_residuals(calls, fusion.layers),
        lambda model, fusion: fusing.unpatch(model, fusion.layers),
    ),
)


def _tolerances(model: nn.Module, answers: list[torch.Tensor]) -> list[float]:
    def nudge(module, args, output):
        return output * (1.0 + torch.finfo(output.dtype).eps)

    handle = input_embeddings(model).register_forward_hook(nudge)
    try:
        noise = _distances(answers, fusing.answers(model))
        return [min(max(_LEAST_TOLERANCE, 3.0 * n), _MOST_TOLERANCE) for n in noise]
    finally:
        handle.remove()


def _distances(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[float]:
    """Of each answer, of its norm."""
    tiny = torch.finfo(torch.float32).tiny
    return [float((b - a).norm() / a.norm().clamp(min=tiny)) for a, b in zip(before, after, strict=True)]


def fuse_model(model: nn.Module, kernels: bool | None = None) -> Fusion:
    """Fuse what can be fused in a quantized causal language model of transformers, in place. `unfuse_model` undoes it.

    The weights' bytes stay as many; while a group of layers is merged, both forms of it exist. The model is still the
    module tree that transformers knows: `generate`, `torch.compile` and caches work as before. Merged layers give the
    same bits as before; fused kernels add up a norm's squares in an order of their own, so that an activation on the
    edge between two codes may take the other one.

    Args:
        model: as `quantize_model` or `from_pretrained` return it, on its device.
        kernels: fuse norms, residual sums and SiLU products with the quantization too; by default on a GPU, where they
            are what a decode step waits for, and not on the CPU, where they gain a few percent.

    Returns:
        What was fused. Nothing, for a model that is not understood.

    Raises:
        ValueError: the model is fused already.
    """
    if getattr(model, "flexq_fusion", None) is not None:
        raise ValueError("the model is fused already; flexq.unfuse_model undoes it")
    fusion = Fusion()
    if not any(isinstance(m, Linear) for m in model.modules()):
        return fusion
    if kernels is None:
        kernels = next(itertools.chain(model.parameters(), model.buffers())).device.type != "cpu"
    try:
        before = fusing.answers(model)
        tolerances = _tolerances(model, before)
    except fusing.NOT_UNDERSTOOD:
        return fusion  # no text model, or one that needs more than token ids
    for step in _STEPS if kernels else _STEPS[:1]:
        try:
            step.take(model, once(watch(model)), fusion)
            moved = _distances(before, fusing.answers(model))
            kept = all(by <= most for by, most in zip(moved, tolerances, strict=True))  # NaN is not
        except fusing.NOT_UNDERSTOOD:
            kept = False
        if not kept:
            step.take_back(model, fusion)
    fusion.kernels = kernels
    model.flexq_fusion = fusion
    return fusion


def unfuse_model(model: nn.Module) -> nn.Module:
    """The model as it was before `fuse_model`, bit for bit, and return it."""
    fusion = getattr(model, "flexq_fusion", None)
    if fusion is not None:
        for names in (fusion.layers, fusion.norms, fusion.mlps):
            fusing.unpatch(model, names)
        unmerge(model, fusion.merged)
        model.flexq_fusion = None
    return model
