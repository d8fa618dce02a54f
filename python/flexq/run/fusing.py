"""Operations between the GEMMs that become one kernel with the quantization after them, found by what modules compute:
SiLU products, RMS norms, and the sum with the residual before a norm."""

import functools

import torch
from torch import nn

from flexq.linear import Linear
from flexq.quantize.tracing import Call, cached_result, once, padded_result, result, watch
from flexq.run.merging import MergedLinear, MergedPart, gemm, merged_at, without_gradient

# What a model that is not as it was taken to be may answer with.
NOT_UNDERSTOOD = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)

# ---- What takes the place of modules' forward ------------------------------------------------------------------------


def _norm_forward(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Feeds the layers after the norm with x + residual, normalized and quantized; returns that sum, whose shape is all
    that is wanted of it where a normalized tensor was."""
    c = norm.flexq_fed.config
    quantized, total = torch.ops.flexq.rms_norm_quantize(
        x, residual, norm.weight, norm.flexq_eps, c.act_bits, c.scheme, c.rotation
    )
    if norm.flexq_poisoned:
        total = torch.full_like(total, 100.0)
    return norm.flexq_fed.feed(without_gradient(total, x), quantized)


def _mlp_forward(mlp: nn.Module, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """down(silu(gate) * up), gate and up from one GEMM."""
    merged, down = mlp.flexq_gate_up, mlp.flexq_down
    y = merged.output_for(x, len(merged.sizes) - 1)
    half = merged.out_features // 2
    gate, up = (y[..., :half], y[..., half:]) if mlp.flexq_gate_first else (y[..., half:], y[..., :half])
    c = down.config
    quantized = torch.ops.flexq.silu_mul_quantize(gate, up, c.act_bits, c.scheme, c.rotation)
    output = gemm(down, quantized, x.numel() // x.shape[-1], x.dtype)
    return without_gradient(output.view(*x.shape[:-1], down.out_features), x)


def _layer_forward(layer: nn.Module, hidden_states: torch.Tensor, **kwargs):
    """x + attention(norm(x)), then the same with the MLP, the first sum inside the second norm's kernel."""
    attention, first, second, mlp = layer.flexq_order
    normed = first(hidden_states)
    attended = attention(hidden_states=normed, **kwargs)
    attended = attended[0] if isinstance(attended, tuple) else attended
    total = _norm_forward(second, attended, hidden_states)
    output = total + mlp(total)
    return (output,) if layer.flexq_returns_tuple else output


def answers(model: nn.Module) -> list[torch.Tensor]:
    """What a fused model must give as before: for a probe, and token by token after a cache if it returns one."""
    try:
        cached = cached_result(model)
    except NOT_UNDERSTOOD:
        cached = None  # its caches are made otherwise
    return [result(model)] if cached is None else [result(model), cached]


# ---- Finding them ----------------------------------------------------------------------------------------------------


def _has_own_forward(call: Call) -> bool:
    """Whether something has changed this very module, as accelerate does where a model is on several devices."""
    return "forward" in call.module.__dict__


def _silu_order(gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor) -> bool | None:
    """Whether product is silu(gate) * up (True), silu(up) * gate (False) or neither (None)."""
    if not gate.shape == up.shape == product.shape:
        return None
    for first, (a, b) in ((True, (gate, up)), (False, (up, gate))):
        if torch.allclose(nn.functional.silu(a) * b, product, rtol=1e-2, atol=1e-6 + 1e-3 * product.abs().max().item()):
            return first
    return None


def is_gate_up(call: Call, calls: dict[str, Call]) -> bool:
    """Whether this layer's two halves are the gate and the up of an MLP with a SiLU."""
    if not isinstance(call.module, Linear) or call.y is None or call.y.shape[-1] % 2:
        return False
    gate, up = call.y.chunk(2, dim=-1)
    return any(
        isinstance(other.module, Linear) and other.x is not None and _silu_order(gate, up, other.x) is not None
        for other in calls.values()
        if other.name.rpartition(".")[0] == call.name.rpartition(".")[0] and other is not call
    )


def fuse_mlps(calls: dict[str, Call], fused: list[str]) -> None:
    """MLPs of merged gate and up, SiLU and down; their names go into `fused` as they are done."""
    for name, call in calls.items():
        inside = [c for n, c in calls.items() if n.startswith(f"{name}.") or not name]
        parts = [c for c in inside if isinstance(c.module, MergedPart)]
        downs = [c for c in inside if isinstance(c.module, Linear) and not isinstance(c.module, MergedLinear)]
        if len(downs) != 1 or not 1 <= len(parts) <= 2 or downs[0].y is not call.y or call.x is None:
            continue
        if _has_own_forward(call):
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
        module.forward = functools.partial(_mlp_forward, module)
        fused.append(name)


def rms_eps(call: Call) -> float | None:
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


def _fed_by(calls: dict[str, Call], norm: Call) -> list[MergedLinear]:
    """The merged layers of the modules that are called with what a norm returned."""
    return [m for c in calls.values() if c.x is norm.y and (m := merged_at(c.module)) is not None]


def fuse_norms(model: nn.Module, calls: dict[str, Call], fused: list[str]) -> None:
    """RMS norms whose output only merged layers read, also where a batch is padded (Mamba's layers read a masked one
    then); their names go into `fused`."""
    try:
        padded = once(watch(model, padded_result))
    except (RuntimeError, ValueError, TypeError):  # it takes no attention mask
        padded = {}
    for name, call in calls.items():
        eps = rms_eps(call)
        if eps is None or _has_own_forward(call):
            continue
        fed = _fed_by(calls, call)
        if not fed or any(m is not fed[0] for m in fed):
            continue
        if name in padded and len(_fed_by(padded, padded[name])) != len(fed):
            continue
        norm = call.module
        norm.__dict__.update(flexq_fed=fed[0], flexq_eps=eps, flexq_poisoned=False)
        norm.forward = functools.partial(_norm_forward, norm)
        fed[0].fed = True
        fused.append(name)
    _drop_unsound(model, fused)


def _are_sound(model: nn.Module, names: list[str], expected: list[torch.Tensor]) -> bool:
    """Whether nobody but the layers that fused norms feed looks at what the norms return: the answers stay."""
    norms = [model.get_submodule(name) for name in names]
    for norm in norms:
        norm.flexq_poisoned = True
    try:
        given = answers(model)
        return len(given) == len(expected) and all(map(torch.equal, given, expected))
    finally:
        for norm in norms:
            norm.flexq_poisoned = False


def _drop_unsound(model: nn.Module, names: list[str]) -> None:
    """Take back fused norms that are not sound."""
    if not names:
        return
    expected = answers(model)
    if _are_sound(model, names, expected):
        return
    for name in [name for name in names if not _are_sound(model, [name], expected)]:
        names.remove(name)
        unpatch(model, [name])


def _gets_what_the_layer_got(attention: Call, layer: Call) -> bool:
    """Whether a layer hands on its keyword arguments, each by its name. It may keep some to itself, or add its own, but
    if it does both, one may be the other by another name."""
    given, got = (call.kwargs.keys() - {"hidden_states"} for call in (layer, attention))
    if given - got and got - given:
        return False
    return all(attention.kwargs[key] is layer.kwargs[key] for key in given & got)


def fuse_residuals(calls: dict[str, Call], fused: list[str]) -> None:
    """Decoder layers whose first sum becomes part of the second norm; their names go into `fused`."""
    for name, call in calls.items():
        children = [calls[n] for n in (f"{name}.{child}" for child, _ in call.module.named_children()) if n in calls]
        norms = [c for c in children if "flexq_fed" in c.module.__dict__]
        if len(norms) != 2 or call.x is None or call.y is None or len(call.inputs) > 1 or _has_own_forward(call):
            continue
        first, second = norms
        others = [c for c in children if c not in norms]
        mlp = [c for c in others if c.x is second.y]
        attention = [c for c in others if c.x is first.y]
        if len(mlp) != 1 or len(attention) != 1 or first.x is not call.x:
            continue
        if "hidden_states" not in attention[0].kwargs or mlp[0].kwargs or attention[0].inputs:
            continue
        if not _gets_what_the_layer_got(attention[0], call):
            continue
        if not torch.equal(call.x + attention[0].y, second.x) or not torch.equal(second.x + mlp[0].y, call.y):
            continue
        layer = call.module
        order = (attention[0].module, first.module, second.module, mlp[0].module)
        layer.__dict__.update(flexq_order=order, flexq_returns_tuple=isinstance(call.output, tuple))
        layer.forward = functools.partial(_layer_forward, layer)
        fused.append(name)


_ATTRIBUTES = ("flexq_gate_up", "flexq_down", "flexq_gate_first", "flexq_fed", "flexq_eps", "flexq_poisoned",
               "flexq_order", "flexq_returns_tuple")  # fmt: skip


def unpatch(model: nn.Module, names: list[str]) -> None:
    """Take fused modules back to what they were; empties the list."""
    for name in names:
        module = model.get_submodule(name)
        if "flexq_fed" in module.__dict__:
            module.flexq_fed.fed = False
        for attribute in (*_ATTRIBUTES, "forward"):
            module.__dict__.pop(attribute, None)
    names.clear()
