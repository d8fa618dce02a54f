"""LoRA adapters of PEFT on quantized models: inference, and training as in QLoRA (arXiv 2305.14314).

    from peft import LoraConfig, get_peft_model
    from flexq.integrations.peft import for_flexq

    model = get_peft_model(quantized, for_flexq(LoraConfig(target_modules=["q_proj", "v_proj"])))

The quantized weights stay as they are; gradients pass through them to the adapters. What `flexq.fuse_model` merges has
no place for an adapter: leave it out for such a model.
"""

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from flexq.linear import Linear


class FlexQLoraLinear(LoraLinear):
    """y = flexq.Linear(x) + scaling * B(A(x)). The adapter stays beside the quantized weight and is never merged."""

    def merge(self, *args, **kwargs) -> None:
        raise NotImplementedError("an adapter cannot be merged into a 6-bit weight without quantizing it again")


def for_flexq(config: LoraConfig) -> LoraConfig:
    """The same configuration, which now finds `flexq.Linear` layers too.

    Args:
        config: of a new adapter (`get_peft_model`) or of one that was saved (`PeftConfig.from_pretrained`, then
            `PeftModel.from_pretrained(..., config=config)`).
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapters of type LORA work on quantized layers, got {type(config).__name__}")
    start = str(config.init_lora_weights).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} takes the adapter's part out of the weight that it is on, "
            "which quantized weights do not allow; True and 'gaussian' work"
        )
    config._register_custom_module({Linear: FlexQLoraLinear})
    return config
