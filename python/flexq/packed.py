"""What layers with quantized weights share: one resident copy of them, canonical or as a device's kernels read it."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexq import ops
from flexq.plan import LayerConfig

_prepacking = threading.Lock()


class PackedModule(nn.Module):
    """A weight [..., N, K] of `config.weight_bits` b, of which one copy is resident.

    As built, or loaded by another library, it is canonical: buffers `qweight` (planes, uint8 [..., N, G, b, 16]) and
    `scales` (float16 [..., N, G] or [..., N, 1]). `prepack` turns it into what the device's kernels read; `state_dict`,
    pickling and moves between devices go through the canonical form, without loss. Several threads may use one module
    at the same time.

    A subclass says how the one becomes the other: `_to_packed` and `_to_canonical`.

    Args:
        rows: of the weight, [N] or [experts, N].
        in_features: K.
        bias: whether there is one, of the shape `rows`.
        config: how the weight is quantized.
        device: of the (uninitialized) weight.
        dtype: of the bias.
    """

    is_flexq_layer = True  # one that a plan names; parts of merged layers are such too

    def __init__(
        self,
        rows: tuple[int, ...],
        in_features: int,
        bias: bool,
        config: LayerConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = rows[-1]
        self.config = config
        self.weight_dtype = dtype or torch.get_default_dtype()
        # For one kind of device's kernels, and so never moved as it is. A buffer: it counts as memory of the model.
        self.register_buffer("_packed", None, persistent=False)
        self._packed_for: str | None = None
        self._register_canonical(
            torch.zeros((*rows, ops.num_groups(in_features), config.weight_bits, 16), dtype=torch.uint8, device=device),
            torch.zeros((*rows, self._scales_per_row), dtype=torch.float16, device=device),
        )
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def _to_packed(self, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _to_canonical(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Of the weight, of all experts."""
        return self.out_features

    @property
    def _scales_per_row(self) -> int:
        return ops.num_groups(self.in_features) if self.config.scheme == "group" else 1

    def _register_canonical(self, planes: torch.Tensor, scales: torch.Tensor) -> None:
        self.register_buffer("qweight", planes)
        self.register_buffer("scales", scales)

    @property
    def is_prepacked(self) -> bool:
        return self._packed is not None

    def prepack(self):
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
        planes, scales = self.qweight, self.scales
        ops.check_scales(scales.reshape(-1, scales.shape[-1]))
        packed = self._to_packed(planes, scales)
        self._packed_for = packed.device.type
        self._packed = packed
        # Empty rather than none: others ask `qweight` where the layer is.
        self._register_canonical(planes.new_empty(0), scales.new_empty(0))

    def canonical(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes uint8 [..., N, G, b, 16] and scales float16 [..., N, G] or [..., N, 1]."""
        if self._packed is None:
            return self.qweight, self.scales
        self._require_own_device()
        return self._to_canonical(self._packed)

    def packed(self) -> torch.Tensor:
        """The weight as the kernels of its device read it."""
        if self._packed is None:
            self.prepack()
        if self._packed is None or self._packed.device.type != self._packed_for:
            self._require_own_device()
        return self._packed

    def _require_own_device(self) -> None:
        if self._packed is None:
            raise RuntimeError("the weight is not in memory, but on the meta device; load the checkpoint")
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

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.in_features

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
        group_bytes = ops.GROUP_SIZE // 8 * self.config.weight_bits
        return self.num_rows * (ops.num_groups(self.in_features) * group_bytes + self._scales_per_row * 2)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"W{c.weight_bits}A{c.act_bits}, scheme={c.scheme}, rotation={c.rotation}"
        )

    # ---- state_dict, devices, pickle: always through the canonical form ----

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.qweight.is_meta and hasattr(destination, "__dict__"):
            # One that stands at several names waits for tensors under the first.
            seen = vars(destination).setdefault("_flexq_seen", set())
            if id(self) in seen:
                return
            seen.add(id(self))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_meaning(destination, prefix, self.config)
        if self._packed is not None:
            destination[prefix + "qweight"], destination[prefix + "scales"] = self.canonical()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if not is_meant(local_metadata, prefix, self.config, errors):
            return
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


# What the codes of a weight mean, which their shapes do not always tell.
_MEANING = ("rotation", "scheme", "weight_bits")


def note_meaning(destination, prefix: str, config: LayerConfig) -> None:
    """Into the metadata that a `state_dict` carries along, how a layer's codes are to be read."""
    metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata["flexq"] = {name: getattr(config, name) for name in _MEANING}


def is_meant(metadata: Mapping[str, Any], prefix: str, config: LayerConfig, errors: list[str]) -> bool:
    """Whether a `state_dict`'s codes are to be read as the layer reads them, if it says how; else adds an error."""
    given = metadata.get("flexq", {})
    other = [name for name in _MEANING if name in given and given[name] != getattr(config, name)]
    layer = prefix[:-1] or "the layer"
    errors += [f"{layer} has {n} {getattr(config, n)!r}, the state_dict's has {given[n]!r}" for n in other]
    return not other


def _cannot_be_written(layer: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"the weight of a flexq.{type(layer).__name__} cannot be written to; quantize another one, or leave the layer "
        "in floating point by skip"
    )


def _written_by(function, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operator writes to, in lists too."""
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
    writes = (a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return torch.utils._pytree.tree_leaves([given.get(a.name) for a in writes])


class DequantizedWeight(torch.Tensor):
    """A module's weight [N, K] as a tensor that is not there: shape, dtype and device cost nothing, any operation on it
    dequantizes the module first. What would change it is refused.

    Args:
        layer: a `PackedModule` of two dimensions with `dequantize(dtype)`.
    """

    _is_hf_initialized = True  # transformers initializes the weights of modules that a checkpoint left out

    @staticmethod
    def __new__(cls, layer: PackedModule):
        shape = (layer.out_features, layer.in_features)
        return cls._make_wrapper_subclass(cls, shape, dtype=layer.weight_dtype, device=layer.device)

    def __init__(self, layer: PackedModule):
        self._layer = layer

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, _) -> None:
        raise _cannot_be_written(self._layer)

    def __setitem__(self, *_) -> None:
        raise _cannot_be_written(self._layer)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"DequantizedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        kwargs = kwargs or {}
        written = [tensor for tensor in _written_by(function, args, kwargs) if isinstance(tensor, cls)]
        if written and args and written[0] is args[0]:
            return cls._unchanged_by(function, args, kwargs)
        if written:
            raise _cannot_be_written(written[0]._layer)

        def real(value):
            return value._layer.dequantize(value.dtype) if isinstance(value, cls) else value

        args, kwargs = torch.utils._pytree.tree_map(real, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def _unchanged_by(cls, function, args, kwargs) -> "DequantizedWeight":
        """The weight after an operation in place that leaves it as it is, such as a clamp that meets nothing.

        Raises:
            RuntimeError: it would change.
        """
        layer = args[0]._layer
        weight = layer.dequantize(args[0].dtype)
        written = weight.clone()
        function(written, *args[1:], **kwargs)
        if not torch.equal(written, weight):
            raise _cannot_be_written(layer)
        return args[0]
