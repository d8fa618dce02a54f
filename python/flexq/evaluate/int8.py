"""What FlexQ is compared with, in plain PyTorch. For evaluation only."""

import torch
from torch import nn

from flexq.quantize.layers import as_linear, linear_layers, replace_module


class Int8Linear(nn.Module):
    """The usual INT8: weights int8 with a scale per output channel, activations int8 with a scale per token.

    Both round to nearest against absmax / 127; the products are exact up to float32's rounding.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        codes = (weight / scale.where(scale > 0, 1.0)).round().clamp(-127, 127)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of the resident weight, scales included."""
        return self.codes.numel() + 4 * self.scale.numel()

    stored_bytes = weight_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
        codes = (x.float() / scale.where(scale > 0, 1.0)).round()
        y = nn.functional.linear(codes, self.codes.float()) * (scale * self.scale.squeeze(1))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def quantize_model_int8(model: nn.Module) -> nn.Module:
    """Replace every linear layer but the LM head by `Int8Linear`, in place."""
    for name, linear in linear_layers(model).items():
        replace_module(model, name, Int8Linear(as_linear(linear)))
    return model
