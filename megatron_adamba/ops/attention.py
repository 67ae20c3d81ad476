"""Causal attention over packed documents and sliding windows, on the library's fused kernel, or in blocks on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.ops.causal_attention import blocks_serve, causal_attention
from megatron_adamba.ops.sink_attention import sink_attention


def attention_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None, seq_idx: Tensor | None
) -> Tensor | None:
    """True where a query may look: not ahead, not past its window, not into another document.

    query_positions: [q]; key_positions: [k], absolute positions in the sequence; window: keys seen, itself included;
    seq_idx: [batch, k] document number of each position, of which the last q belong to the queries, or None.
    Returns [1 or batch, 1, q, k] bool, or None where plain causality over equal lengths says it all.
    """
    if window is None and seq_idx is None and query_positions.numel() == key_positions.numel():
        return None
    distance = query_positions[:, None] - key_positions[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    allowed = allowed[None, None]
    if seq_idx is not None:
        queries = seq_idx[:, -query_positions.numel() :]
        allowed = allowed & (queries[:, None, :, None] == seq_idx[:, None, None, :])
    return allowed


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v, with each KV head serving a group of query heads.

    q: [batch, q, heads, head_dim]; k, v: [batch, k, kv_heads, head_dim]; mask as `attention_mask` makes it, None for
    causal; sinks: [heads], see `sink_attention`. Returns [batch, q, heads * head_dim].
    """
    batch, queries, heads, head_dim = q.shape
    if q.numel() == 0:
        # kernels refuse empty batches and no heads, and an idle layer must still hand zero gradients back
        idle = k.sum() + v.sum() if sinks is None else k.sum() + v.sum() + 0 * sinks.sum()
        return (q + idle).flatten(2)
    if sinks is not None:
        return sink_attention(q, k, v, sinks, mask, scale)
    if mask is None and blocks_serve(q, k):
        return causal_attention(q, k, v, scale)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=heads != k.shape[2],
    )
    return out.transpose(1, 2).reshape(batch, queries, heads * head_dim)


def segment_positions(length: int, start: int, device: torch.device) -> Tensor:
    """Absolute positions start .. start + length - 1, [length]."""
    return torch.arange(start, start + length, device=device)
