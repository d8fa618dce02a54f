"""`flexq.Linear`: a linear layer with 6-bit weights."""

import threading

import torch
from torch import nn

from flexq import ops
from flexq.plan import LayerConfig

_prepacking = threading.Lock()


class Linear(nn.Module):
    """y = x W^T + b with a 6-bit W, its activations quantized to `config.act_bits` on the way in.

    One copy of the weight is resident. As built, or loaded by another library, it is canonical: buffers `qweight`
    (planes, uint8 [N, G, 6, 16]) and `scales` (float16 [N, G] or [N, 1]). `prepack` turns it into what the device's
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

    is_flexq_layer = True  # one that a plan names; parts of merged layers are such too

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
        self.weight_dtype = dtype or torch.get_default_dtype()
        # For one kind of device's kernels, and so never moved as it is. A buffer: it counts as memory of the model.
        self.register_buffer("_packed", None, persistent=False)
        self._packed_for: str | None = None
        self._register_canonical(*self._empty_canonical(device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, linear: nn.Module, config: LayerConfig | None = None) -> "Linear":
        """Quantize an `nn.Linear`, or another module whose `weight` is [N, K]. ValueError for weights not finite."""
        config = config or LayerConfig()
        planes, scales = ops.quantize_weight(linear.weight.detach(), config.scheme, config.rotation)
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
        """Turn the canonical weight into its device's layout and free it. Nothing happens on the meta device.

        Raises:
            ValueError: a scale that is NaN, Inf or negative.
        """
        if self._packed is None and self.qweight.device.type != "meta":
            with _prepacking:
                if self._packed is None:
                    self._prepack()
        return self

    def _prepack(self) -> None:
        config, planes, scales = self.config, self.qweight, self.scales
        ops.check_scales(scales)
        packed = ops.prepack(planes, scales, self.in_features, config.scheme, config.rotation)
        self._packed_for = packed.device.type
        self._packed = packed
        # Empty rather than none: others ask `qweight` where the layer is.
        self._register_canonical(planes.new_empty(0), scales.new_empty(0))

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes uint8 [N, G, 6, 16] and scales float16 [N, G] or [N, 1]."""
        if self._packed is None:
            return self.qweight, self.scales
        self._require_own_device()
        config = self.config
        return ops.unprepack(self._packed, self.out_features, self.in_features, config.scheme, config.rotation)

    def _require_own_device(self) -> None:
        if self._packed.device.type != self._packed_for:
            raise RuntimeError(
                f"a weight that was prepacked for {self._packed_for} was moved to {self._packed.device} by other means "
                "than `to`; offloading of quantized layers is not supported"
            )

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
            parts.append(torch.ops.flexq.linear(x, packed, None, self.out_features, 8, c.scheme, c.rotation))
        return torch.cat(parts)

    @property
    def weight(self) -> torch.Tensor:
        """Stands for the weight [N, K] where code looks at `linear.weight`: its shape, dtype and device cost nothing,
        anything else dequantizes it. Cannot be written to."""
        return DequantizedWeight(self)

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def device(self) -> torch.device:
        return self.qweight.device

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
        if x.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(x, self)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` without checks of x and gradients."""
        c = self.config
        if self._packed.device.type != self._packed_for:
            self._require_own_device()
        return torch.ops.flexq.linear(x, self._packed, self.bias, self.out_features, c.act_bits, c.scheme, c.rotation)

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


class _StraightThrough(torch.autograd.Function):
    """The layer with the gradient of y = x W^T + b with respect to x, W being the dequantized weight."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


class DequantizedWeight(torch.Tensor):
    """A `flexq.Linear`'s weight as a tensor that is not there: each operation on it dequantizes the layer first."""

    _is_hf_initialized = True  # transformers initializes the weights of modules that a checkpoint left out

    @staticmethod
    def __new__(cls, layer: Linear):
        shape = (layer.out_features, layer.in_features)
        return cls._make_wrapper_subclass(cls, shape, dtype=layer.weight_dtype, device=layer.device)

    def __init__(self, layer: Linear):
        self._layer = layer

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"DequantizedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError("the weight of a flexq.Linear cannot be written to; quantize another one")

        def real(value):
            return value._layer.dequantize(value.dtype) if isinstance(value, cls) else value

        args, kwargs = torch.utils._pytree.tree_map(real, (args, kwargs or {}))
        return function(*args, **kwargs)
