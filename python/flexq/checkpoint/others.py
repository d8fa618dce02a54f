"""Quantized checkpoints of others: integer weights, symmetric, whose codes and scales FlexQ can hold as they are.

compressed-tensors `pack-quantized`: `X.weight_packed` int32 [N, W] of codes plus 2^(bits - 1), lowest bits first. Words
hold 32 // bits codes each, or with 5 and 6 bits in later versions a stream of bits, so that W tells which it is.
`X.weight_scale` [N, K / group] or [N, 1].

GPTQ, and AutoRound in GPTQ's layout: `X.qweight` int32 [K / p, N] and `X.qzeros` int32 [G, N / p], likewise packed;
`X.scales` [G, N]. The stored zero point is one less than the zero point in the first version of the format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexq import ops
from flexq.checkpoint.source import ModelError

SUFFIXES = (".weight_packed", ".qweight")  # of what a quantized layer is known by
Read = Callable[[str], torch.Tensor | None]  # a layer's tensor by its last name, None if it has none


@dataclass
class Layer:
    """A layer's weight.

    Args:
        codes: int8 [N, K].
        scales: float16, [N, G] or [N, 1].
        bits: 4, 5, 6 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int


@dataclass(frozen=True)
class Format:
    """How a checkpoint holds its quantized layers.

    Args:
        method: as its config.json names it.
        bits, group: of the weights; group 0: one scale a row.
        activations: what the checkpoint says of them, for people.
        read: of a layer.
        tensors: last names of a layer's tensors that become something else, or nothing.
        cache: what the checkpoint says of the KV cache, for people; None if nothing.
    """

    method: str
    bits: int
    group: int
    activations: str
    read: Callable[["Format", str, Read, int, int], Layer]
    tensors: tuple[str, ...]
    cache: str | None = None


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a config.json names.

    Raises:
        ModelError: it is none of these, or FlexQ cannot hold it exactly; the message says which setting is why.
    """
    settings = config.get("quantization_config") or {}
    _require(isinstance(settings, Mapping), f"quantization_config must be an object, got {settings!r:.60}")
    method = str(settings.get("quant_method", "none"))
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method in ("gptq", "auto-round", "auto_round", "intel/auto-round"):
        return _gptq(method, settings)
    raise ModelError(
        f"quant_method must be compressed-tensors, gptq or auto-round to be converted, got {method}; quantize the "
        "model in floating point that it was made from"
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ModelError(f"{what}; quantize the model in floating point that it was made from")


def _checked(bits: Any, group: Any) -> tuple[int, int]:
    _require(bits in ops.WEIGHT_BITS, f"weights must have {', '.join(map(str, ops.WEIGHT_BITS))} bits, got {bits}")
    _require(
        group in (0, ops.GROUP_SIZE),
        f"weights must have a scale per row or per {ops.GROUP_SIZE} inputs, got one per {group}",
    )
    return bits, group


def _compressed_tensors(settings: Mapping[str, Any]) -> Format:
    kind = settings.get("format")
    _require(kind == "pack-quantized", f"compressed-tensors' format must be pack-quantized, got {kind}")
    # Inputs that are transformed first (rotations of SpinQuant, QuIP): without that the weights are of another model.
    _require(
        not settings.get("transform_config"), "transform_config must be empty: FlexQ does not apply others' transforms"
    )
    sparsity = settings.get("sparsity_config") or {}
    dense = isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"
    _require(dense, f"weights must be dense, sparsity_config is {sparsity!r:.80}")
    groups = settings.get("config_groups") or {}
    known = isinstance(groups, Mapping) and all(isinstance(group, Mapping) for group in groups.values())
    _require(known, f"config_groups must be an object of objects, got {groups!r:.80}")
    groups = list(groups.values())
    _require(len(groups) == 1, f"config_groups must be one, got {len(groups)}")
    weight = groups[0].get("weights") or {}
    _require(weight.get("type", "int") == "int", f"weights must be integers, got {weight.get('type')}")
    _require(bool(weight.get("symmetric", True)), "weights must be symmetric, these have zero points")
    order = weight.get("actorder")
    _require(order in (None, False, "weight", "static"), f"columns must be in their order, actorder is {order}")
    strategy = weight.get("strategy")
    _require(strategy in ("group", "channel"), f"weights must have a scale per group or channel, got {strategy}")
    bits, group = _checked(weight.get("num_bits"), 0 if strategy == "channel" else weight.get("group_size"))
    inputs = groups[0].get("input_activations")
    said = "16 bits" if not inputs else f"{inputs.get('num_bits')} bits, {inputs.get('strategy')}"
    tensors = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    cache = settings.get("kv_cache_scheme")
    cached = f"{cache.get('num_bits', 'fewer')} bits" if isinstance(cache, Mapping) else None
    return Format("compressed-tensors", bits, group, said, _read_compressed, tensors, cached)


def _gptq(method: str, settings: Mapping[str, Any]) -> Format:
    _require(bool(settings.get("sym", True)), "weights must be symmetric, sym is false")
    packing = settings.get("packing_format", "auto_round:auto_gptq") if method != "gptq" else "auto_gptq"
    _require(str(packing).endswith("gptq"), f"AutoRound's packing_format must be GPTQ's, got {packing}")
    kind = settings.get("checkpoint_format") or "gptq"
    _require(kind in ("gptq", "gptq_v2"), f"GPTQ's checkpoint_format must be gptq or gptq_v2, got {kind}")
    given = settings.get("group_size", ops.GROUP_SIZE)
    bits, group = _checked(settings.get("bits"), 0 if given == -1 else given)
    _require(bits in (4, 8), f"GPTQ's bits must be 4 or 8, got {bits}")
    reader = _read_gptq_v2 if kind == "gptq_v2" else _read_gptq
    return Format(method, bits, group, "16 bits", reader, ("qweight", "qzeros", "scales", "g_idx"))


def _unpacked(packed: torch.Tensor, bits: int, dim: int, length: int) -> torch.Tensor:
    """int32 words along `dim` to codes of 0 .. 2^bits - 1, `length` of them."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    words = packed.unsqueeze(dim + 1) if dim == 0 else packed.unsqueeze(-1)
    shape = (1, -1, 1) if dim == 0 else (1, 1, -1)
    codes = (words >> shifts.view(shape)) & ((1 << bits) - 1)
    codes = codes.flatten(0, 1) if dim == 0 else codes.flatten(1, 2)
    return codes.narrow(dim, 0, length)


def _unpacked_stream(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """int32 words [N, W] that codes may cross the ends of to codes [N, length]."""
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    begin = torch.arange(length) * bits
    word, shift = begin // 32, begin % 32
    pairs = words[:, word] | words[:, word + 1] << 32
    return (pairs >> shift & ((1 << bits) - 1)).to(torch.int32)


def _need(layer: str, read: Read, name: str, dtype: torch.dtype | None, *shapes: tuple[int, ...]) -> torch.Tensor:
    """The tensor, which is of one of the shapes."""
    tensor = read(name)
    if tensor is None:
        raise ModelError(f"{layer} has no tensor {name}")
    if tuple(tensor.shape) not in shapes or (dtype is not None and tensor.dtype != dtype):
        kind = "" if dtype is None else f"{dtype} "
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ModelError(f"{layer}.{name} must be {kind}{allowed}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _layer(layer: str, form: Format, codes: torch.Tensor, scales: torch.Tensor) -> Layer:
    half = scales.to(torch.float16)
    different = half.to(torch.float64) != scales.to(torch.float64)
    if different.any():
        raise ModelError(
            f"{layer}: {int(different.sum())} of {scales.numel()} scales are no float16 numbers, as FlexQ's are (the "
            f"first is {scales[different][0].item():.9g}); quantize the model in floating point that it was made from"
        )
    if not (torch.isfinite(half) & (half >= 0)).all():
        raise ModelError(f"{layer}: scales must be finite and 0 or more")
    signed = (codes - (1 << (form.bits - 1))).to(torch.int8)
    return Layer(signed, half, form.bits)


def _groups(form: Format, k: int) -> int:
    return 1 if form.group == 0 else -(-k // form.group)


def _read_compressed(form: Format, layer: str, read: Read, n: int, k: int) -> Layer:
    shape = read("weight_shape")
    if shape is not None and shape.flatten().tolist() != [n, k]:
        raise ModelError(f"{layer}.weight_shape is {shape.flatten().tolist()}, the model's layer [{n}, {k}]")
    _require(read("weight_zero_point") is None, f"{layer} has zero points")
    _require_order(layer, read("weight_g_idx"), form, k)
    words, stream = -(-k // (32 // form.bits)), -(-k * form.bits // 32)
    packed = _need(layer, read, "weight_packed", torch.int32, (n, words), (n, stream))
    is_stream = packed.shape[1] == stream != words
    scales = _need(layer, read, "weight_scale", None, (n, _groups(form, k)))
    _require(words != stream or 32 % form.bits == 0, f"{layer}: {k} inputs do not tell how its codes are packed")
    codes = _unpacked_stream(packed, form.bits, k) if is_stream else _unpacked(packed, form.bits, 1, k)
    return _layer(layer, form, codes, scales)


def _read_gptq(form: Format, layer: str, read: Read, n: int, k: int, stored_zero: int = -1) -> Layer:
    per_word = 32 // form.bits
    groups = _groups(form, k)
    _require(k % per_word == 0 and n % per_word == 0, f"{layer}: [{n}, {k}] does not fill words of {per_word} codes")
    packed = _need(layer, read, "qweight", torch.int32, (k // per_word, n))
    zeros = _unpacked(_need(layer, read, "qzeros", torch.int32, (groups, n // per_word)), form.bits, 1, n)
    expected = (1 << (form.bits - 1)) + stored_zero
    _require(
        bool((zeros == expected).all()), f"{layer} is not symmetric: its stored zero points are not all {expected}"
    )
    _require_order(layer, read("g_idx"), form, k)
    scales = _need(layer, read, "scales", None, (groups, n)).t().contiguous()
    return _layer(layer, form, _unpacked(packed, form.bits, 0, k).t().contiguous(), scales)


def _read_gptq_v2(form: Format, layer: str, read: Read, n: int, k: int) -> Layer:
    return _read_gptq(form, layer, read, n, k, stored_zero=0)


def _require_order(layer: str, group_of: torch.Tensor | None, form: Format, k: int) -> None:
    """Columns in their order: act-order checkpoints put each into a group of its own choice."""
    if group_of is None:
        return
    expected = torch.arange(k) // (form.group or k)
    same = group_of.flatten().tolist() == expected.tolist()
    _require(same, f"{layer}: its columns are reordered (act-order), which FlexQ's format does not have")
