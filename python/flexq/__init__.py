"""FlexQ: large language models with 6-bit weights and 6- or 8-bit activations."""

from flexq._core import version as _version
from flexq.calibrate import calibrate_model
from flexq.checkpoint import CheckpointError, quantize_checkpoint, save_model
from flexq.fuse import fuse_model, unfuse_model
from flexq.generation import Generation, generate
from flexq.integrations.transformers import FlexQConfig  # registers the quantization method "flexq"
from flexq.linear import Linear
from flexq.models import ModelError, load_model
from flexq.ops import (
    activation_codes,
    dequantize_weight,
    gemm,
    linear,
    pack_codes,
    prepack,
    quantize_activation,
    quantize_weight,
    rms_norm_quantize,
    silu_mul_quantize,
    unpack_codes,
    unprepack,
)
from flexq.patch import quantize_model
from flexq.plan import LayerConfig, Plan

__version__ = _version()

__all__ = [
    "CheckpointError",
    "FlexQConfig",
    "Generation",
    "LayerConfig",
    "Linear",
    "ModelError",
    "Plan",
    "activation_codes",
    "calibrate_model",
    "dequantize_weight",
    "fuse_model",
    "gemm",
    "generate",
    "linear",
    "load_model",
    "pack_codes",
    "prepack",
    "quantize_activation",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_weight",
    "rms_norm_quantize",
    "save_model",
    "silu_mul_quantize",
    "unfuse_model",
    "unpack_codes",
    "unprepack",
]
