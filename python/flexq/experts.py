"""`flexq.experts.Experts`: the experts of a mixture-of-experts layer with 6-bit weights."""

import threading

import torch
from torch import nn
from torch.nn import functional

from flexq import ops
from flexq.plan import LayerConfig

_prepacking = threading.Lock()


class ExpertWeights(nn.Module):
    """One projection of all experts, which a plan names as a layer: "gate_up" [E, 2I, H] or "down" [E, H, I].

    One copy is resident. As built, or loaded by another library, it is canonical: buffers `qweight` (planes, uint8
    [E, N, G, 6, 16]) and `scales` (float16 [E, N, G] or [E, N, 1]), those of single experts one after another.
    `prepack` turns it into what the device's kernels read; `state_dict`, pickling and moves between devices go through
    the canonical form, without loss.

    Args:
        projection: "gate_up" or "down".
        desc: the experts that it is a part of.
        config: how it is quantized, as `desc` says.
        bias: whether there is one, [E, N].
        device: of the (uninitialized) weight.
        dtype: of the bias.
    """

    is_flexq_layer = True  # one that a plan names

    def __init__(
        self,
        projection: str,
        desc: ops.ExpertsDesc,
        config: LayerConfig,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.projection = projection
        self.config = config
        self.num_experts = desc.experts
        self.out_features, self.in_features = desc.shape(projection)
        self.weight_dtype = dtype or torch.get_default_dtype()
        self._desc = desc
        # For one kind of device's kernels, and so never moved as it is. A buffer: it counts as memory of the model.
        self.register_buffer("_packed", None, persistent=False)
        self._packed_for: str | None = None
        groups = ops.num_groups(self.in_features)
        shape = (self.num_experts, self.out_features)
        self._register_canonical(
            torch.zeros((*shape, groups, 6, 16), dtype=torch.uint8, device=device),
            torch.zeros((*shape, self._scales_per_row), dtype=torch.float16, device=device),
        )
        if bias:
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def _scales_per_row(self) -> int:
        return ops.num_groups(self.in_features) if self.config.scheme == "group" else 1

    def _register_canonical(self, planes: torch.Tensor, scales: torch.Tensor) -> None:
        self.register_buffer("qweight", planes)
        self.register_buffer("scales", scales)

    @property
    def is_prepacked(self) -> bool:
        return self._packed is not None

    def prepack(self) -> "ExpertWeights":
        """Turn the canonical weights into their device's layout and free them. Nothing happens on the meta device.

        Raises:
            ValueError: a scale that is NaN, Inf or negative.
        """
        if self._packed is None and self.qweight.device.type != "meta":
            with _prepacking:
                if self._packed is None:
                    self._prepack()
        return self

    def _prepack(self) -> None:
        planes, scales = self.qweight, self.scales
        ops.check_scales(scales.flatten(0, 1))
        packed = ops.experts_prepack(planes, scales, self.projection, self._desc)
        self._packed_for = packed.device.type
        self._packed = packed
        # Empty rather than none: others ask `qweight` where the layer is.
        self._register_canonical(planes.new_empty(0), scales.new_empty(0))

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes uint8 [E, N, G, 6, 16] and scales float16 [E, N, G] or [E, N, 1]."""
        if self._packed is None:
            return self.qweight, self.scales
        self._require_own_device()
        return ops.experts_unprepack(self._packed, self.projection, self._desc)

    def packed(self) -> torch.Tensor:
        """The weights as the kernels of their device read them."""
        if self._packed is None:
            self.prepack()
        if self._packed.device.type != self._packed_for:
            self._require_own_device()
        return self._packed

    def _require_own_device(self) -> None:
        if self._packed.device.type != self._packed_for:
            raise RuntimeError(
                f"experts that were prepacked for {self._packed_for} were moved to {self._packed.device} by other "
                "means than `to`; offloading of quantized layers is not supported"
            )

    def _unprepack(self) -> bool:
        """Back to canonical buffers; whether there was anything to do."""
        if self._packed is None:
            return False
        self._register_canonical(*self.canonical())
        self._packed = None
        return True

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [E, N, K] in floating point."""
        planes, scales = (t.flatten(0, 1) for t in self.canonical())
        config = self.config
        weight = ops.dequantize_weight(planes, scales, self.in_features, config.scheme, config.rotation, dtype)
        return weight.unflatten(0, (self.num_experts, self.out_features))

    @property
    def num_weights(self) -> int:
        return self.num_experts * self.out_features * self.in_features

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the resident weights, scales included."""
        tensors = (self.qweight, self.scales) if self._packed is None else (self._packed,)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the canonical weights, as a checkpoint holds them."""
        row = ops.num_groups(self.in_features) * 96 + self._scales_per_row * 2
        return self.num_experts * self.out_features * row

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, W{c.weight_bits}A{c.act_bits}, scheme={c.scheme}, rotation={c.rotation}"
        )

    # ---- state_dict, devices, pickle: always through the canonical form ----

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[prefix + "qweight"], destination[prefix + "scales"] = self.canonical()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        given = {name: state_dict.get(prefix + name) for name in ("qweight", "scales")}
        if self._packed is not None and any(t is not None for t in given.values()):
            self._unprepack()
        elif self._packed is not None:
            missing += [prefix + name for name in given] if strict else []
        for name, tensor in given.items():
            own = getattr(self, name)
            if tensor is not None and own is not None and tensor.dtype != own.dtype:
                errors.append(f"{prefix}{name} must be {own.dtype}, got {tensor.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.prepack()

    def _apply(self, fn, recurse=True):
        packed = self._unprepack()
        scales = self.scales
        super()._apply(fn, recurse)
        # `.half()`, `.to(dtype)` and the like change the bias, never the scales, which are part of the format.
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self.prepack() if packed else self

    def __getstate__(self):
        state = self.__dict__.copy()
        if self._packed is not None:
            qweight, scales = self.canonical()
            state["_buffers"] = {**self._buffers, "qweight": qweight, "scales": scales, "_packed": None}
            state["_was_prepacked"] = True
        return state

    def __setstate__(self, state):
        prepacked = state.pop("_was_prepacked", False)
        super().__setstate__(state)
        if prepacked:
            self.prepack()


class Experts(nn.Module):
    """E experts, each down(f(gate) * up) of gate and up = gate_up(x), and the weighted sum of those a router chose.

    Called like transformers' modules of experts. `gate_up_proj` and `down_proj` are `ExpertWeights`, so that a
    checkpoint has `gate_up_proj.qweight`, `gate_up_proj.scales`, `down_proj.qweight` and so on, each sliceable by
    expert. What an expert computes, and its parameters, are those of `flexq.ops.ExpertsDesc`.

    The weights cannot be trained. Gradients with respect to the hidden states and the router's weights pass: through
    the dequantized weights, and straight through the quantization of the activations.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: whether there are biases, [E, 2I] and [E, H].
        gate_up_config: how gate_up is quantized.
        down_config: how down is; as gate_up if None.
        function: "silu", "gelu" or "gelu_tanh".
        alpha, limit, up_offset, interleaved: as in `flexq.ops.ExpertsDesc`.
        weights_on_input: the router's weights multiply the inputs of experts instead of their outputs.
        device: of the (uninitialized) weights.
        dtype: of the biases.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        gate_up_config: LayerConfig | None = None,
        down_config: LayerConfig | None = None,
        function: str = "silu",
        alpha: float = 1.0,
        limit: float = 0.0,
        up_offset: float = 0.0,
        interleaved: bool = False,
        weights_on_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        up = gate_up_config or LayerConfig()
        down = down_config or up
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.weights_on_input = weights_on_input
        desc = ops.ExpertsDesc(
            num_experts, hidden_size, intermediate_size, up.scheme, up.rotation, up.act_bits, down.scheme,
            down.rotation, down.act_bits, function, alpha, limit, up_offset, interleaved,
        )  # fmt: skip
        self._desc = desc
        self.gate_up_proj = ExpertWeights("gate_up", desc, up, bias, device, dtype)
        self.down_proj = ExpertWeights("down", desc, down, bias, device, dtype)

    @classmethod
    def from_float(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        gate_up_config: LayerConfig | None = None,
        down_config: LayerConfig | None = None,
        **settings,
    ) -> "Experts":
        """Round weights [E, 2I, H] and [E, H, I] to nearest, expert by expert; `settings` as the class has them.

        Where a model holds them transposed, pass `weight.transpose(1, 2)`. ValueError for weights not finite.
        """
        up = gate_up_config or LayerConfig()
        quantized = [
            quantize_experts(weight.detach(), config) for weight, config in ((gate_up, up), (down, down_config or up))
        ]
        return cls.from_canonical(
            *quantized, down.shape[2], gate_up_bias, down_bias, up, down_config, dtype=gate_up.dtype, **settings
        )

    @classmethod
    def from_canonical(
        cls,
        gate_up: tuple[torch.Tensor, torch.Tensor],
        down: tuple[torch.Tensor, torch.Tensor],
        intermediate_size: int,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        gate_up_config: LayerConfig | None = None,
        down_config: LayerConfig | None = None,
        prepack: bool = True,
        **settings,
    ) -> "Experts":
        """Experts around planes and scales [E, N, ...] of each projection, and biases [E, N] or None."""
        num_experts, hidden_size = down[0].shape[:2]
        settings["device"] = "meta"
        experts = cls(num_experts, hidden_size, intermediate_size, False, gate_up_config, down_config, **settings)
        for layer, canonical, bias in (
            (experts.gate_up_proj, gate_up, gate_up_bias),
            (experts.down_proj, down, down_bias),
        ):
            layer._register_canonical(*canonical)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        return experts.prepack() if prepack else experts

    @property
    def desc(self) -> ops.ExpertsDesc:
        """What `flexq.ops.experts_forward` computes for this layer."""
        bits = self.gate_up_proj.config.act_bits, self.down_proj.config.act_bits
        desc = self._desc
        if bits == (desc.gate_up_act_bits, desc.down_act_bits):
            return desc
        return desc._replace(gate_up_act_bits=bits[0], down_act_bits=bits[1])

    def prepack(self) -> "Experts":
        """Turn the canonical weights into their device's layout and free them."""
        self.gate_up_proj.prepack()
        self.down_proj.prepack()
        return self

    @property
    def is_prepacked(self) -> bool:
        return self.gate_up_proj.is_prepacked and self.down_proj.is_prepacked

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights [E, 2I, H] and [E, H, I] in floating point."""
        return self.gate_up_proj.dequantize(dtype), self.down_proj.dequantize(dtype)

    @property
    def device(self) -> torch.device:
        return self.gate_up_proj.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the resident weights, scales included."""
        return self.gate_up_proj.weight_bytes + self.down_proj.weight_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the canonical weights, as a checkpoint holds them."""
        return self.gate_up_proj.stored_bytes + self.down_proj.stored_bytes

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, k] (int32, int64) and top_k_weights [T, k] -> [T, H].

        With an `expert_map`, int32 [experts everywhere], an index is one of it, and it has each expert's index here or
        -1; experts that are not here add nothing.
        """
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must end in {self.hidden_size} features, got shape {list(hidden_states.shape)}"
            )
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            return _StraightThrough.apply(hidden_states, top_k_weights, top_k_index, expert_map, self)
        return self.multiply(hidden_states, top_k_index, top_k_weights, expert_map)

    def multiply(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map=None) -> torch.Tensor:
        """`forward` without checks and gradients."""
        up, down = self.gate_up_proj, self.down_proj
        return torch.ops.flexq.experts_forward(
            x, ids, weights, up.packed(), down.packed(), up.bias, down.bias, expert_map, self.weights_on_input,
            *self.desc,
        )  # fmt: skip

    def float_forward(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward` by the dequantized weights, its activations not quantized: what gradients are of."""
        layers = (self.gate_up_proj, self.down_proj)
        tensors = [layer.dequantize(x.dtype) for layer in layers]
        tensors += [None if layer.bias is None else layer.bias.to(x.dtype) for layer in layers]
        if expert_map is not None:
            ids = expert_map[ids.long()]
        return float_experts(self._desc, x, ids, weights, *tensors, weights_on_input=self.weights_on_input)

    def extra_repr(self) -> str:
        d = self._desc
        extra = "".join(
            f", {name}={value}"
            for name, value, usual in (
                ("alpha", d.alpha, 1.0),
                ("limit", d.limit, 0.0),
                ("up_offset", d.up_offset, 0.0),
                ("interleaved", d.interleaved, False),
                ("weights_on_input", self.weights_on_input, False),
            )
            if value != usual
        )
        return f"function={d.function}{extra}"


class ExpertsByRows(Experts):
    """`Experts` called with rows [E * T, H] alone, the first T of them for expert 0 and so on, as Llama 4 does; rows of
    zeros, of tokens that were not sent there, give zeros."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        ids, weights, expert_map = by_rows(rows, self.num_experts)
        return super().forward(rows, ids, weights, expert_map)


def by_rows(rows: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices [E * T, 1] of the experts that rows [E * T, H] are for, E for a row of zeros; weights of 1; and a map
    that has no expert for E."""
    owners = torch.arange(experts, device=rows.device, dtype=torch.int32).repeat_interleave(len(rows) // experts)
    ids = torch.where(rows.any(-1), owners, experts).unsqueeze(-1)
    expert_map = torch.arange(experts + 1, device=rows.device, dtype=torch.int32)
    expert_map[experts] = -1
    return ids, torch.ones_like(ids, dtype=rows.dtype), expert_map


class _StraightThrough(torch.autograd.Function):
    """The layer with the gradient of `Experts.float_forward`."""

    @staticmethod
    def forward(ctx, x, weights, ids, expert_map, experts: Experts) -> torch.Tensor:
        ctx.experts = experts
        ctx.save_for_backward(x, weights, ids, expert_map)
        return experts.multiply(x, ids, weights, expert_map)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weights, ids, expert_map = ctx.saved_tensors
        with torch.enable_grad():
            x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
            y = ctx.experts.float_forward(x, ids, weights, expert_map)
            gradients = torch.autograd.grad(y, (x, weights), gradient, allow_unused=True)
        return *gradients, None, None, None


def gate(desc: ops.ExpertsDesc, gate_up: torch.Tensor) -> torch.Tensor:
    """h [..., I] of gate and up values [..., 2I], in their dtype."""
    g, up = (gate_up[..., 0::2], gate_up[..., 1::2]) if desc.interleaved else gate_up.chunk(2, -1)
    if desc.limit > 0:
        g, up = g.clamp(max=desc.limit), up.clamp(-desc.limit, desc.limit)
    if desc.function == "silu":
        activated = g * torch.sigmoid(desc.alpha * g)
    else:
        activated = functional.gelu(g, approximate="tanh" if desc.function == "gelu_tanh" else "none")
    return activated * (up + desc.up_offset)


def float_experts(
    desc: ops.ExpertsDesc,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    weights_on_input: bool = False,
) -> torch.Tensor:
    """[T, H] of what `desc` describes in floating point; indices below 0 add nothing."""
    y = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, k = torch.where(ids == expert)
        scale = weights[token, k].unsqueeze(-1).to(x.dtype)
        u = x[token] @ gate_up[expert].T
        u = u * scale if weights_on_input else u
        h = gate(desc, u if gate_up_bias is None else u + gate_up_bias[expert])
        product = functional.linear(h, down[expert], None if down_bias is None else down_bias[expert])
        y = y.index_add(0, token, product if weights_on_input else product * scale)
    return y


def quantize_experts(weight: torch.Tensor, config: LayerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights [E, N, K] to nearest, expert by expert: planes uint8 [E, N, G, 6, 16] and scales float16."""
    quantized = [ops.quantize_weight(expert, config.scheme, config.rotation) for expert in weight]
    return torch.stack([planes for planes, _ in quantized]), torch.stack([scales for _, scales in quantized])
