"""FlexQ: large language models with 6-bit weights and 6- or 8-bit activations."""

import importlib
import sys
from typing import TYPE_CHECKING

from flexq import _imports

if TYPE_CHECKING:
    from flexq.checkpoint.calibrate import calibrate_checkpoint
    from flexq.checkpoint.convert import quantize_checkpoint
    from flexq.checkpoint.convert_others import convert_checkpoint
    from flexq.checkpoint.read import load_model
    from flexq.checkpoint.source import CheckpointError, ModelError
    from flexq.checkpoint.write import save_model
    from flexq.embedding import Embedding
    from flexq.integrations.transformers import FlexQConfig
    from flexq.linear import Linear
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
    from flexq.plan import LayerConfig, Plan
    from flexq.quantize.calibrate import calibrate_model
    from flexq.quantize.model import quantize_model
    from flexq.run.fuse import fuse_model, unfuse_model
    from flexq.run.generate import Generation, generate

# Where each public name lives; imported when it is first asked for, so that `import flexq` costs next to nothing.
_HOMES = {
    "flexq.checkpoint.calibrate": ("calibrate_checkpoint",),
    "flexq.checkpoint.convert": ("quantize_checkpoint",),
    "flexq.checkpoint.convert_others": ("convert_checkpoint",),
    "flexq.checkpoint.read": ("load_model",),
    "flexq.checkpoint.source": ("CheckpointError", "ModelError"),
    "flexq.checkpoint.write": ("save_model",),
    "flexq.embedding": ("Embedding",),
    "flexq.integrations.transformers": ("FlexQConfig",),
    "flexq.linear": ("Linear",),
    "flexq.ops": (
        "activation_codes",
        "dequantize_weight",
        "gemm",
        "linear",
        "pack_codes",
        "prepack",
        "quantize_activation",
        "quantize_weight",
        "rms_norm_quantize",
        "silu_mul_quantize",
        "unpack_codes",
        "unprepack",
    ),
    "flexq.plan": ("LayerConfig", "Plan"),
    "flexq.quantize.calibrate": ("calibrate_model",),
    "flexq.quantize.model": ("quantize_model",),
    "flexq.run.fuse": ("fuse_model", "unfuse_model"),
    "flexq.run.generate": ("Generation", "generate"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "Embedding",
    "FlexQConfig",
    "Generation",
    "LayerConfig",
    "Linear",
    "ModelError",
    "Plan",
    "activation_codes",
    "calibrate_checkpoint",
    "calibrate_model",
    "convert_checkpoint",
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


class _Package(type(sys)):
    """The package: public names are attributes that are imported when they are asked for."""

    def __getattr__(self, name: str):
        if name == "__version__":
            from flexq._core import version

            value = version()
        elif name in _HOME_OF:
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
        else:
            raise AttributeError(f"module 'flexq' has no attribute {name!r}")
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value) -> None:
        # Importing the module `flexq.linear` would hide the function of that name.
        if name in _HOME_OF and isinstance(value, type(sys)):
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
        super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
_imports.after("torch", lambda: importlib.import_module("flexq.ops"))  # torch.ops.flexq
_imports.after("transformers.quantizers.auto", lambda: importlib.import_module("flexq.integrations.transformers"))
