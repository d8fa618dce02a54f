"""`fuse_model`: fewer, larger operations between the GEMMs of a quantized model, found by what its layers do.

One forward pass over a few tokens, watched by hooks, shows which layers share an input, which norm produced it and what
becomes of their outputs; no class or attribute name is asked for. Then, step by step,

- layers with one input and the same settings become one GEMM over their rows (q/k/v, gate/up), their input quantized
  once;
- gate/up/down MLPs with a SiLU quantize `silu(gate) * up` in one kernel;
- RMS norms, and the sum with the residual before them, are one kernel with the quantization of what they feed.

Each step is kept only if the model's logits stay what they were; a model that is not understood runs as it did.
"""

import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexq.linear import Linear
from flexq.patch import replace_module

# How far a sound step may move the logits, of their norm: three times as far as the embeddings' last bit does, which a
# deep W6A6 model answers with other codes in all later layers. A step that is wrong moves them by their own size.
_LEAST_TOLERANCE, _MOST_TOLERANCE = 0.02, 0.3


# ---- What takes the place of the layers ------------------------------------------------------------------------------


class MergedLinear(Linear):
    """Layers with one input as one: their rows below each other. Each layer's place has a `MergedPart`."""

    def __init__(self, layers: list[Linear]):
        first = layers[0]
        sizes = [layer.out_features for layer in layers]
        super().__init__(first.in_features, sum(sizes), bias=False, config=first.config, device="meta")
        planes, scales = zip(*(layer.canonical() for layer in layers), strict=True)
        self._register_canonical(torch.cat(planes), torch.cat(scales))
        self.has_bias = [layer.bias is not None for layer in layers]
        if any(self.has_bias):
            like = next(layer.bias for layer in layers if layer.bias is not None)
            biases = [like.new_zeros(n) if b.bias is None else b.bias for n, b in zip(sizes, layers, strict=True)]
            self.bias = nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=False)
        self.sizes = sizes
        self.train(first.training)
        self.prepack()
        self.forget()

    def forget(self) -> None:
        self._input: torch.Tensor | None = None
        self._quantized: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def feed(self, stand_in: torch.Tensor, quantized: torch.Tensor) -> None:
        """The next input, quantized already; `stand_in` is the tensor that the parts will be called with."""
        self._input, self._quantized, self._output = stand_in, quantized, None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The output [..., N] of all parts for x, computed at most once."""
        if self._input is not x:
            self.forget()
            self._input = x
        if self._output is None:
            if self._quantized is None:
                self._output = self(x)
            else:
                y = gemm(self, self._quantized, x.numel() // x.shape[-1], x.dtype)
                self._output = y.view(*x.shape[:-1], self.out_features)
        return self._output

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """`run`, for the last who asks."""
        output = self.run(x)
        self.forget()
        return output

    def split(self) -> Iterator[Linear]:
        """The layers again."""
        planes, scales = self.canonical()
        begin = 0
        for size, has_bias in zip(self.sizes, self.has_bias, strict=True):
            rows = slice(begin, begin + size)
            like = nn.Linear(self.in_features, size, bias=False, device="meta")
            layer = Linear.from_canonical(planes[rows].clone(), scales[rows].clone(), like, self.config)
            if has_bias:
                layer.bias = nn.Parameter(self.bias[rows].detach().clone(), requires_grad=False)
            yield layer.train(self.training)
            begin += size

    def __getstate__(self):
        self.forget()
        return super().__getstate__()


class MergedPart(nn.Module):
    """One layer's share of a `MergedLinear`: some of its outputs. The part that is called first owns it."""

    def __init__(self, merged: MergedLinear, index: int):
        super().__init__()
        if index == 0:
            self.merged = merged
        else:
            self.__dict__["merged"] = merged  # a module's child elsewhere: not this one's too
        self.index = index
        self.in_features, self.out_features = merged.in_features, merged.sizes[index]
        self.begin = sum(merged.sizes[:index])
        self.is_last = index == len(merged.sizes) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.merged.take(x) if self.is_last else self.merged.run(x)
        return output[..., self.begin : self.begin + self.out_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.index}"


def gemm(layer: Linear, quantized: torch.Tensor, m: int, dtype: torch.dtype) -> torch.Tensor:
    """[m, N] from an activation quantized for `layer`."""
    c = layer.config
    return torch.ops.flexq.gemm(
        quantized, layer._packed, layer.bias, m, layer.out_features, layer.in_features, c.act_bits, c.scheme,
        c.rotation, dtype,
    )  # fmt: skip


def _norm_forward(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Feeds the layers after the norm with x + residual, normalized and quantized; returns that sum, whose shape is all
    that is wanted of it where a normalized tensor was."""
    c = norm.flexq_fed.config
    quantized, total = torch.ops.flexq.rms_norm_quantize(
        x, residual, norm.weight, norm.flexq_eps, c.act_bits, c.scheme, c.rotation
    )
    if norm.flexq_poisoned:
        total = torch.full_like(total, 100.0)
    norm.flexq_fed.feed(total, quantized)
    return total


def _mlp_forward(mlp: nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """down(silu(gate) * up), gate and up from one GEMM."""
    merged, down = mlp.flexq_gate_up, mlp.flexq_down
    y = merged.take(x)
    half = merged.out_features // 2
    gate, up = (y[..., :half], y[..., half:]) if mlp.flexq_gate_first else (y[..., half:], y[..., :half])
    c = down.config
    quantized = torch.ops.flexq.silu_mul_quantize(gate, up, c.act_bits, c.scheme, c.rotation)
    output = gemm(down, quantized, x.numel() // x.shape[-1], x.dtype)
    return output.view(*x.shape[:-1], down.out_features)


def _layer_forward(layer: nn.Module, hidden_states: torch.Tensor, *args, **kwargs):
    """x + attention(norm(x)), then the same with the MLP, the first sum inside the second norm's kernel."""
    attention, first, second, mlp = layer.flexq_order
    normed = first(hidden_states)
    attended = attention(*args, hidden_states=normed, **kwargs)
    attended = attended[0] if isinstance(attended, tuple) else attended
    total = _norm_forward(second, attended, hidden_states)
    output = total + mlp(total)
    return (output,) if layer.flexq_returns_tuple else output


# ---- Watching a forward pass -----------------------------------------------------------------------------------------


@dataclass
class _Call:
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


def _probe_ids(model: nn.Module) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    return torch.randint(0, vocabulary, (1, 7), generator=generator).to(device)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=_probe_ids(model), use_cache=False).logits.float()


def _tolerance(model: nn.Module, logits: torch.Tensor) -> float:
    def nudge(module, args, output):
        return output * (1.0 + torch.finfo(output.dtype).eps)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        noise = _distance(logits, _logits(model))
        return min(max(_LEAST_TOLERANCE, 3.0 * noise), _MOST_TOLERANCE)
    finally:
        handle.remove()


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm().clamp(min=torch.finfo(before.dtype).tiny))


def _watch(model: nn.Module) -> list[_Call]:
    """Every module's call in a forward pass, in the order in which they began. Tensors stay alive, so that two are the
    same only if they are."""
    calls: list[_Call] = []
    open_calls: dict[int, list[_Call]] = defaultdict(list)
    handles = []

    def before(name: str):
        def hook(module, args, kwargs):
            call = _Call(name, module, args, kwargs=kwargs)
            calls.append(call)
            open_calls[id(module)].append(call)

        return hook

    def after(module, args, kwargs, output):
        open_calls[id(module)].pop().output = output

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        _logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _once(calls: list[_Call]) -> dict[str, _Call]:
    """The calls of modules that were called exactly once."""
    count: dict[str, int] = defaultdict(int)
    for call in calls:
        count[call.name] += 1
    return {call.name: call for call in calls if count[call.name] == 1}


# ---- The steps -------------------------------------------------------------------------------------------------------


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


def _merge(model: nn.Module, calls: dict[str, _Call], fusion: Fusion) -> None:
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    norms = {id(call.y) for call in calls.values() if _rms_eps(call) is not None}
    halves = {call.name for call in calls.values() if _is_gate_up(call, calls)}
    for name, call in calls.items():
        if isinstance(call.module, Linear) and call.x is not None:
            groups[id(call.x), call.module.config, call.module.in_features].append(name)
    for (x, _, _), names in groups.items():
        # A single layer too, if a norm can feed it or it is an MLP's gate and up in one.
        if len(names) > 1 or x in norms or names[0] in halves:
            merged = MergedLinear([calls[name].module for name in names])
            for index, name in enumerate(names):
                replace_module(model, name, MergedPart(merged, index))
            fusion.merged.append(names)


def _silu_order(gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor) -> bool | None:
    """Whether product is silu(gate) * up (True), silu(up) * gate (False) or neither (None)."""
    if not gate.shape == up.shape == product.shape:
        return None
    for first, (a, b) in ((True, (gate, up)), (False, (up, gate))):
        if torch.allclose(nn.functional.silu(a) * b, product, rtol=1e-2, atol=1e-6 + 1e-3 * product.abs().max().item()):
            return first
    return None


def _is_gate_up(call: _Call, calls: dict[str, _Call]) -> bool:
    """Whether this layer's two halves are the gate and the up of an MLP with a SiLU."""
    if not isinstance(call.module, Linear) or call.y is None or call.y.shape[-1] % 2:
        return False
    gate, up = call.y.chunk(2, dim=-1)
    return any(
        isinstance(other.module, Linear) and other.x is not None and _silu_order(gate, up, other.x) is not None
        for other in calls.values()
        if other.name.rpartition(".")[0] == call.name.rpartition(".")[0] and other is not call
    )


def _fuse_mlps(model: nn.Module, calls: dict[str, _Call], fusion: Fusion) -> None:
    for name, call in calls.items():
        inside = [c for n, c in calls.items() if n.startswith(f"{name}.") or not name]
        parts = [c for c in inside if isinstance(c.module, MergedPart)]
        downs = [c for c in inside if isinstance(c.module, Linear) and not isinstance(c.module, MergedLinear)]
        if len(downs) != 1 or not 1 <= len(parts) <= 2 or downs[0].y is not call.y or call.x is None:
            continue
        merged = parts[0].module.merged
        if len(merged.sizes) != len(parts) or any(p.x is not call.x for p in parts):
            continue
        outputs = [p.y for p in parts] if len(parts) == 2 else list(parts[0].y.chunk(2, dim=-1))
        order = _silu_order(outputs[0], outputs[1], downs[0].x)
        if order is None:
            continue
        module = call.module
        module.__dict__.update(flexq_gate_up=merged, flexq_down=downs[0].module, flexq_gate_first=order)
        module.forward = types.MethodType(_mlp_forward, module)
        fusion.mlps.append(name)


def _rms_eps(call: _Call) -> float | None:
    """The epsilon of x -> weight * (x / rms(x)), rounded before the product, if that is what the module computed."""
    weight = getattr(call.module, "weight", None)
    if next(call.module.children(), None) is not None or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    x, y = call.x, call.y
    if x is None or y is None or x.shape != y.shape or x.shape[-1:] != weight.shape or weight.dtype != x.dtype:
        return None
    for eps in (v for v in vars(call.module).values() if isinstance(v, float)):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        if torch.equal(weight * scaled.to(x.dtype), y):
            return eps
    return None


def _merged_at(module: nn.Module) -> MergedLinear | None:
    """What a module hands its input to."""
    return module.merged if isinstance(module, MergedPart) else module.__dict__.get("flexq_gate_up")


def _fuse_norms(model: nn.Module, calls: dict[str, _Call], fusion: Fusion) -> None:
    for name, call in calls.items():
        eps = _rms_eps(call)
        if eps is None:
            continue
        fed = [m for c in calls.values() if c.x is call.y and (m := _merged_at(c.module)) is not None]
        if not fed or any(m is not fed[0] for m in fed):
            continue
        norm = call.module
        norm.__dict__.update(flexq_fed=fed[0], flexq_eps=eps, flexq_poisoned=False)
        norm.forward = types.MethodType(_norm_forward, norm)
        fusion.norms.append(name)
    _drop_unsound_norms(model, fusion)


def _sound_norms(model: nn.Module, fusion: Fusion) -> bool:
    """Whether nobody but the layers that a fused norm feeds looks at what it returns."""
    norms = [model.get_submodule(name) for name in fusion.norms]
    expected = _logits(model)
    for norm in norms:
        norm.flexq_poisoned = True
    try:
        return torch.equal(_logits(model), expected)
    finally:
        for norm in norms:
            norm.flexq_poisoned = False


def _drop_unsound_norms(model: nn.Module, fusion: Fusion) -> None:
    if _sound_norms(model, fusion):
        return
    names = fusion.norms.copy()
    fusion.norms.clear()
    for name in names:  # one by one
        fusion.norms.append(name)
        if not _sound_norms(model, fusion):
            _unpatch(model, [fusion.norms.pop()])


def _fuse_residuals(model: nn.Module, calls: dict[str, _Call], fusion: Fusion) -> None:
    for name, call in calls.items():
        children = [calls[n] for n in (f"{name}.{child}" for child, _ in call.module.named_children()) if n in calls]
        norms = [c for c in children if "flexq_fed" in c.module.__dict__]
        if len(norms) != 2 or call.x is None or call.y is None:
            continue
        first, second = norms
        others = [c for c in children if c not in norms]
        mlp = [c for c in others if c.x is second.y]
        attention = [c for c in others if c.x is first.y]
        if len(mlp) != 1 or len(attention) != 1 or first.x is not call.x:
            continue
        if "hidden_states" not in attention[0].kwargs or mlp[0].kwargs or attention[0].inputs:
            continue
        if not torch.equal(call.x + attention[0].y, second.x) or not torch.equal(second.x + mlp[0].y, call.y):
            continue
        layer = call.module
        order = (attention[0].module, first.module, second.module, mlp[0].module)
        layer.__dict__.update(flexq_order=order, flexq_returns_tuple=isinstance(call.output, tuple))
        layer.forward = types.MethodType(_layer_forward, layer)
        fusion.layers.append(name)


_ATTRIBUTES = ("flexq_gate_up", "flexq_down", "flexq_gate_first", "flexq_fed", "flexq_eps", "flexq_poisoned",
               "flexq_order", "flexq_returns_tuple")  # fmt: skip


def _unpatch(model: nn.Module, names: list[str]) -> None:
    for name in names:
        module = model.get_submodule(name)
        for attribute in (*_ATTRIBUTES, "forward"):
            module.__dict__.pop(attribute, None)
    names.clear()


def _unmerge(model: nn.Module, fusion: Fusion) -> None:
    for names in fusion.merged:
        merged = model.get_submodule(names[0]).merged
        for name, layer in zip(names, merged.split(), strict=True):
            replace_module(model, name, layer)
    fusion.merged.clear()


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
        kernels = next(model.parameters()).device.type != "cpu"
    before = _logits(model)
    tolerance = _tolerance(model, before)
    steps: list[tuple[Callable[..., None], Callable[[], None]]] = [
        (_merge, lambda: _unmerge(model, fusion)),
        (_fuse_mlps, lambda: _unpatch(model, fusion.mlps)),
        (_fuse_norms, lambda: _unpatch(model, fusion.norms)),
        (_fuse_residuals, lambda: _unpatch(model, fusion.layers)),
    ]
    for step, undo in steps if kernels else steps[:1]:
        try:
            step(model, _once(_watch(model)), fusion)
            kept = _distance(before, _logits(model)) <= tolerance  # NaN is not
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            kept = False  # a model that is not as the step took it to be
        if not kept:
            undo()
    fusion.kernels = kernels
    model.flexq_fusion = fusion
    return fusion


def unfuse_model(model: nn.Module) -> nn.Module:
    """The model as it was before `fuse_model`, bit for bit, and return it."""
    fusion = getattr(model, "flexq_fusion", None)
    if fusion is not None:
        for names in (fusion.layers, fusion.norms, fusion.mlps):
            _unpatch(model, names)
        _unmerge(model, fusion)
        model.flexq_fusion = None
    return model
