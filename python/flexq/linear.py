"""`flexq.Linear`: a linear layer with quantized weights."""

import torch
from torch import nn

from flexq import ops
from flexq.packed import DequantizedWeight, PackedModule
from flexq.plan import LayerConfig


class Linear(PackedModule):
    """y = x W^T + b, W of `config.weight_bits` b, its activations quantized to `config.act_bits` on the way in.

    One copy of the weight is resident. As built, or loaded by another library, it is canonical: buffers `qweight`
    (planes, uint8 [N, G, b, 16]) and `scales` (float16 [N, G] or [N, 1]). `prepack` turns it into what the device's
    kernels read; `state_dict`, pickling and moves between devices go through the canonical form, without loss.

    The weight cannot be trained. Gradients with respect to x pass: through the dequantized weight, and straight through
    the quantization of the activations, so that adapters beside such layers (LoRA) can be trained.

    Several threads may run one layer at the same time.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        config: how the layer is quantized.
        device: of the (uninitialized) weight.
        dtype: of the bias, and of `weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: LayerConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__((out_features,), in_features, bias, config or LayerConfig(), device, dtype)

    @classmethod
    def from_float(cls, linear: nn.Module, config: LayerConfig | None = None) -> "Linear":
        """Quantize an `nn.Linear`, or another module whose `weight` is [N, K]. ValueError for weights not finite."""
        config = config or LayerConfig()
        planes, scales = ops.quantize_weight(linear.weight.detach(), config.scheme, config.rotation, config.weight_bits)
        return cls.from_canonical(planes, scales, linear, config)

    @classmethod
    def from_canonical(
        cls,
        planes: torch.Tensor,
        scales: torch.Tensor,
        like: nn.Module,
        config: LayerConfig | None = None,
        prepack: bool = True,
    ) -> "Linear":
        """A layer around planes and scales, with the features, bias, dtype and training flag of `like`."""
        n, k = like.out_features, like.in_features
        layer = cls(k, n, bias=False, config=config, device="meta", dtype=like.weight.dtype)
        layer._register_canonical(planes, scales)
        if like.bias is not None:
            layer.bias = nn.Parameter(like.bias.detach(), requires_grad=False)
        if prepack:
            layer.prepack()
        return layer.train(like.training)

    def _to_packed(self, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return ops.prepack(planes, scales, self.in_features, self.config.scheme, self.config.rotation)

    def _to_canonical(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        return ops.unprepack(packed, self.out_features, self.in_features, c.scheme, c.rotation, c.weight_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in floating point."""
        config = self.config
        if self._packed is not None and self._packed.is_cuda:
            return self._outputs_of_unit_vectors().T.to(dtype)
        return ops.dequantize_weight(*self.canonical(), self.in_features, config.scheme, config.rotation, dtype)

    def _outputs_of_unit_vectors(self) -> torch.Tensor:
        """The weight's transpose [K, N], float32, by the device's kernels: a unit vector, rotated or not, is exact in
        8-bit codes, since all that is not zero in it has the same magnitude."""
        c, k, rows = self.config, self.in_features, 1024
        packed, device = self._packed, self._packed.device
        parts = []
        for begin in range(0, k, rows):
            x = torch.zeros((min(rows, k - begin), k), device=device)
            x.diagonal(begin).fill_(1)
            parts.append(
                torch.ops.flexq.linear(x, packed, None, self.out_features, 8, c.scheme, c.rotation, c.weight_bits)
            )
        return torch.cat(parts)

    @property
    def weight(self) -> torch.Tensor:
        """Stands for the weight [N, K] where code looks at `linear.weight`."""
        return DequantizedWeight(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], of x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must end in {self.in_features} features, got shape {list(x.shape)}")
        if self._packed is None:
            self.prepack()
        if x.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(x, self)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` without checks of x and gradients."""
        c = self.config
        if self._packed is None or self._packed.device.type != self._packed_for:
            self._require_own_device()
        return torch.ops.flexq.linear(
            x, self._packed, self.bias, self.out_features, c.act_bits, c.scheme, c.rotation, c.weight_bits
        )


class _StraightThrough(torch.autograd.Function):
    """The layer with the gradient of y = x W^T + b with respect to x, W being the dequantized weight."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.layer.dequantize(gradient.dtype), None
