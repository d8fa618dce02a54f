"""Plans that several tests quantize with."""

import flexq

# Merged layers whose parts differ, and every width.
MIXED = flexq.Plan(
    flexq.LayerConfig(act_bits=6),
    {
        "*.k_proj": flexq.LayerConfig(act_bits=8),
        "*.o_proj": flexq.LayerConfig(act_bits=8, weight_bits=4),
        "*.0.mlp.down_proj": flexq.LayerConfig(weight_bits=5),
        "*.0.mlp.up_proj": flexq.LayerConfig(act_bits=8, rotation="none"),
        "lm_head": flexq.LayerConfig(act_bits=8, weight_bits=8),
    },
)
