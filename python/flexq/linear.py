"""`flexq.Linear`: a linear layer with 6-bit weights."""

import torch
from torch import nn

from flexq import ops
from flexq.plan import LayerConfig


class Linear(nn.Module):
    """y = x W^T + b with a 6-bit W, its activations quantized to `config.act_bits` on the way in. Inference only.

    One copy of the weight is resident. As built, or loaded by another library, it is canonical: buffers `qweight`
    (planes, uint8 [N, G, 6, 16]) and `scales` (float16 [N, G] or [N, 1]). `prepack` turns it into what the device's
    kernels read; `state_dict`, pickling and moves between devices go through the canonical form, without loss.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        config: how the layer is quantized.
        device: of the (uninitialized) weight.
        dtype: of the bias.
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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config or LayerConfig()
        self._packed: torch.Tensor | None = None
        self._register_canonical(*self._empty_canonical(device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, linear: nn.Linear, config: LayerConfig | None = None) -> "Linear":
        """Quantize an `nn.Linear`. ValueError for weights that are not finite."""
        return cls.from_canonical(*_quantize(linear.weight, config or LayerConfig()), linear, config)

    @classmethod
    def from_canonical(
        cls, planes: torch.Tensor, scales: torch.Tensor, like: nn.Linear, config: LayerConfig | None = None
    ) -> "Linear":
        """A layer around planes and scales, with the features, bias and training flag of `like`."""
        layer = cls(like.in_features, like.out_features, bias=False, config=config, device="meta")
        layer._register_canonical(planes, scales)
        if like.bias is not None:
            layer.bias = nn.Parameter(like.bias.detach(), requires_grad=False)
        layer.prepack()
        return layer.train(like.training)

    def _empty_canonical(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        groups = ops.num_groups(self.in_features)
        scales = groups if self.config.scheme == "group" else 1
        return (
            torch.zeros((self.out_features, groups, 6, 16), dtype=torch.uint8, device=device),
            torch.zeros((self.out_features, scales), dtype=torch.float16, device=device),
        )

    def _register_canonical(self, planes: torch.Tensor | None, scales: torch.Tensor | None) -> None:
        self.register_buffer("qweight", planes)
        self.register_buffer("scales", scales)

    @property
    def is_prepacked(self) -> bool:
        return self._packed is not None

    def prepack(self) -> "Linear":
        """Turn the canonical weight into its device's layout and free it. Nothing happens on the meta device."""
        if self._packed is None and self.qweight.device.type != "meta":
            config = self.config
            self._packed = ops.prepack(self.qweight, self.scales, self.in_features, config.scheme, config.rotation)
            # Empty rather than none: others ask `qweight` where the layer is.
            self._register_canonical(self.qweight.new_empty(0), self.scales.new_empty(0))
        return self

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes uint8 [N, G, 6, 16] and scales float16 [N, G] or [N, 1]."""
        if self._packed is None:
            return self.qweight, self.scales
        config = self.config
        return ops.unprepack(self._packed, self.out_features, self.in_features, config.scheme, config.rotation)

    def _unprepack(self) -> bool:
        """Back to canonical buffers; whether there was anything to do."""
        if self._packed is None:
            return False
        self._register_canonical(*self.canonical())
        self._packed = None
        return True

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in floating point."""
        config = self.config
        return ops.dequantize_weight(*self.canonical(), self.in_features, config.scheme, config.rotation, dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the resident weight, scales included."""
        tensors = (self.qweight, self.scales) if self._packed is None else (self._packed,)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the canonical weight, as a checkpoint holds it."""
        groups = ops.num_groups(self.in_features)
        scales = groups if self.config.scheme == "group" else 1
        return self.out_features * (groups * 96 + scales * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], of x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must end in {self.in_features} features, got shape {list(x.shape)}")
        if self._packed is None:
            self.prepack()
        config = self.config
        return torch.ops.flexq.linear(
            x, self._packed, self.bias, self.out_features, config.act_bits, config.scheme, config.rotation
        )

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"W{c.weight_bits}A{c.act_bits}, scheme={c.scheme}, rotation={c.rotation}"
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
        return self.prepack() if packed else self

    def __getstate__(self):
        state = self.__dict__.copy()
        if self._packed is not None:
            qweight, scales = self.canonical()
            state["_buffers"] = {**self._buffers, "qweight": qweight, "scales": scales}
            state["_packed"] = None
            state["_was_prepacked"] = True
        return state

    def __setstate__(self, state):
        prepacked = state.pop("_was_prepacked", False)
        super().__setstate__(state)
        if prepacked:
            self.prepack()


def _quantize(weight: torch.Tensor, config: LayerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_weight(weight.detach(), config.scheme, config.rotation)
