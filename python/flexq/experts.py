"""`flexq.experts.Experts`: the experts of a mixture-of-experts layer with quantized weights."""

import torch
from torch import nn
from torch.nn import functional

from flexq import ops
from flexq.packed import PackedModule
from flexq.plan import LayerConfig


class ExpertWeights(PackedModule):
    """One projection of all experts, which a plan names as a layer: "gate_up" [E, 2I, H] or "down" [E, H, I].

    One copy is resident. As built, or loaded by another library, it is canonical: buffers `qweight` (planes, uint8
    [E, N, G, b, 16]) and `scales` (float16 [E, N, G] or [E, N, 1]), those of single experts one after another.
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

    def __init__(
        self,
        projection: str,
        desc: ops.ExpertsDesc,
        config: LayerConfig,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        rows, in_features = desc.shape(projection)
        super().__init__((desc.experts, rows), in_features, bias, config, device, dtype)
        self.projection = projection
        self.num_experts = desc.experts
        self._desc = desc

    def _to_packed(self, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return ops.experts_prepack(planes, scales, self.projection, self._desc)

    def _to_canonical(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.experts_unprepack(packed, self.projection, self._desc)

    @property
    def num_rows(self) -> int:
        return self.num_experts * self.out_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [E, N, K] in floating point."""
        planes, scales = (t.flatten(0, 1) for t in self.canonical())
        config = self.config
        weight = ops.dequantize_weight(planes, scales, self.in_features, config.scheme, config.rotation, dtype)
        return weight.unflatten(0, (self.num_experts, self.out_features))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


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
            down.rotation, down.act_bits, function, alpha, limit, up_offset, interleaved, up.weight_bits,
            down.weight_bits,
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
    """Round weights [E, N, K] to nearest, expert by expert: planes uint8 [E, N, G, b, 16] and scales float16."""
    quantized = [ops.quantize_weight(expert, config.scheme, config.rotation, config.weight_bits) for expert in weight]
    return torch.stack([planes for planes, _ in quantized]), torch.stack([scales for _, scales in quantized])
