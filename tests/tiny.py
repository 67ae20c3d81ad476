"""A model that trains in a second, as flags of a run."""

TINY_SHAPE = {
    "model.hidden_size": "32",
    "model.head_dim": "8",
    "model.num_heads": "4",
    "model.num_kv_groups": "2",
    "model.ffn_size": "64",
    "model.ffn_granule": "16",
    "model.mamba_head_dim": "8",
}
