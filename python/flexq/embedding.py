"""`flexq.Embedding`: a token embedding with quantized weights."""

import torch
from torch import nn

from flexq import ops
from flexq.packed import DequantizedWeight, PackedModule
from flexq.plan import LayerConfig

# One scale a row: a row is looked up as a whole. Not rotated: nothing is multiplied, and a row would have to be rotated
# back at each lookup.
CONFIG = LayerConfig(weight_bits=8, scheme="channel", rotation="none")
_SCALE_BYTES = 2
_DTYPES = (torch.uint8, torch.float16)


def rows_of(planes: torch.Tensor, scales: torch.Tensor, k: int) -> torch.Tensor:
    """Canonical planes uint8 [N, G, 8, 16] and scales float16 [N, 1] as rows of codes and a scale, uint8 [N, K + 2].

    Raises:
        ValueError: other shapes or dtypes.
    """
    shapes = (len(planes), ops.num_groups(k), CONFIG.weight_bits, 16), (len(planes), 1)
    if (tuple(planes.shape), tuple(scales.shape)) != shapes or (planes.dtype, scales.dtype) != _DTYPES:
        raise ValueError(
            f"planes must be uint8 {list(shapes[0])} and scales float16 {list(shapes[1])} for K = {k}, got "
            f"{planes.dtype} {list(planes.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    codes = ops.unpack_codes(planes.cpu())[:, :k]
    return torch.cat([codes.view(torch.uint8), scales.cpu().view(torch.uint8)], dim=1).to(planes.device)


def canonical_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `rows_of`, exact; codes that pad K to whole groups are 0."""
    codes, scales = rows[:, :-_SCALE_BYTES].view(torch.int8), rows[:, -_SCALE_BYTES:].contiguous().view(torch.float16)
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % ops.GROUP_SIZE))
    return ops.pack_codes(codes, CONFIG.weight_bits), scales


def dequantized_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., K + 2] -> [..., K], each code times the row's scale."""
    codes, scales = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous()
    return (codes.view(torch.int8) * scales.view(torch.float16).float()).to(dtype)


def look_up(rows: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of rows uint8 [N, K + 2] those of ids [...], int32 or int64, dequantized: [..., K]. For ids that are no row, what
    PyTorch has: IndexError on a CPU."""
    return dequantized_rows(nn.functional.embedding(ids, rows), dtype)


class Embedding(PackedModule):
    """y = W[ids], W [N, K] of 8-bit codes with a scale a row: y[k] = code[k] * scale, rounded to the weight's dtype.

    As built, or loaded by another library, the weight is canonical, as that of a `flexq.Linear` with `weight_bits` 8,
    `scheme` "channel" and `rotation` "none": buffers `qweight` (planes, uint8 [N, G, 8, 16]) and `scales` (float16
    [N, 1]). `prepack` makes rows of it, K codes and their scale, uint8 [N, K + 2]; a lookup reads the rows that it is
    asked for. `state_dict`, pickling and moves between devices go through the canonical form.

    The weight cannot be trained, and no gradient passes.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        padding_idx: kept for those who ask; it matters in training alone.
        embed_scale: what each row is multiplied with after the lookup, as some models do; None for nothing.
        rounds_scale: whether `embed_scale` is first rounded to the weight's dtype.
        device: of the (uninitialized) weight.
        dtype: of y, and of `weight`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        rounds_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__((num_embeddings,), embedding_dim, False, CONFIG, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.embed_scale, self.rounds_scale = embed_scale, rounds_scale
        self._factor = self._rounded_scale()

    def _rounded_scale(self) -> float | None:
        if self.embed_scale is None or not self.rounds_scale:
            return self.embed_scale
        return torch.tensor(self.embed_scale, dtype=self.weight_dtype, device="cpu").item()

    def set_canonical(self, planes: torch.Tensor, scales: torch.Tensor) -> "Embedding":
        """Take planes uint8 [N, G, 8, 16] and scales float16 [N, 1] for the weight, and return the module."""
        self._packed = None
        self._register_canonical(planes, scales)
        return self

    def _to_packed(self, planes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return rows_of(planes, scales, self.embedding_dim)

    def _to_canonical(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return canonical_of(packed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in floating point, not multiplied with `embed_scale`."""
        return dequantized_rows(self.packed(), dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Stands for the weight [N, K] where code looks at `embedding.weight`."""
        return DequantizedWeight(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...], int32 or int64 -> [..., K]. For ids that are no row, what PyTorch has: IndexError on a CPU."""
        y = look_up(self.packed(), ids, self.weight_dtype)
        return y if self._factor is None else y * self._factor

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._factor = self._rounded_scale()
        return self

    def extra_repr(self) -> str:
        scaled = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, W{self.config.weight_bits}{scaled}"
