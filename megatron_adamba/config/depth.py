"""One dial: `--depth N` derives a model's size, its batch and its learning rates, as nanochat does."""

from __future__ import annotations

from typing import Any

from megatron_adamba.errors import ConfigError

HEAD_DIM = 128
REFERENCE_HIDDEN = 768
"""hidden size at which nanochat's learning rates were found; AdamW's scale with (hidden / 768)^-0.5"""
MAX_BATCH_TOKENS = 2**19


def derive_from_depth(depth: int, seq_len: int = 2048) -> dict[str, Any]:
    """Flat settings (`model.hidden_size`, ...) that follow from the number of layers. Raises ConfigError."""
    if depth < 1:
        raise ConfigError(f"--depth {depth}: must be 1 or more, for example --depth 12")
    hidden = 64 * depth
    scale = (hidden / REFERENCE_HIDDEN) ** -0.5
    batch_tokens = min(MAX_BATCH_TOKENS, 2**15 * 2 ** (depth - 1).bit_length())
    return {
        "model.num_layers": depth,
        "model.hidden_size": hidden,
        "model.head_dim": HEAD_DIM,
        "model.num_heads": max(1, -(-hidden // HEAD_DIM)),
        "train.seq_len": seq_len,
        "train.global_batch_size": max(1, batch_tokens // seq_len),
        "optimizer.name": "muon",
        "optimizer.muon_lr": 0.02,
        "optimizer.embedding_lr": round(0.2 * scale, 6),
        "optimizer.head_lr": round(0.004 * scale, 6),
        "optimizer.lr": round(0.004 * scale, 6),
    }


REASONS = {
    "model.num_layers": "the dial itself",
    "model.hidden_size": "64 x depth",
    "model.head_dim": "fixed",
    "model.num_heads": "hidden_size / 128, rounded up",
    "train.seq_len": "fixed",
    "train.global_batch_size": "2^15 tokens x depth to the next power of two, 2^19 at most, in samples",
    "optimizer.name": "hidden matrices by Muon",
    "optimizer.muon_lr": "Muon's updates do not depend on the width",
    "optimizer.embedding_lr": "0.2 x (hidden / 768)^-0.5",
    "optimizer.head_lr": "0.004 x (hidden / 768)^-0.5",
    "optimizer.lr": "0.004 x (hidden / 768)^-0.5",
}
"""Why each derived value is what it is; printed at start-up."""
