"""LoRA adapters of PEFT on quantized models, for inference.

    from peft import PeftConfig, PeftModel
    from flexq.integrations.peft import for_flexq

    config = for_flexq(PeftConfig.from_pretrained(adapter))
    model = PeftModel.from_pretrained(quantized, adapter, config=config)

What `flexq.fuse_model` merges has no place for an adapter: leave it out for such a model.
"""

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from flexq.linear import Linear


class FlexQLoraLinear(LoraLinear):
    """y = flexq.Linear(x) + scaling * B(A(x)). The adapter stays beside the quantized weight and is never merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        packed = self.get_base_layer()._packed
        if device is None and packed is not None:
            device = packed.device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def merge(self, *args, **kwargs) -> None:
        raise NotImplementedError("an adapter cannot be merged into a 6-bit weight without quantizing it again")


def for_flexq(config: LoraConfig) -> LoraConfig:
    """The same configuration, which now finds `flexq.Linear` layers too."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapters of type LORA work on quantized layers, got {type(config).__name__}")
    config._register_custom_module({Linear: FlexQLoraLinear})
    return config
