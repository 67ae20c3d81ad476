"""Attention of one query a sequence over what its cache holds: decoding is bound by reading keys and values.

On a CPU the library's fused kernel takes many times as long over bfloat16 as reading them does. Batched matmuls run at
that speed, but round scores to bfloat16; asking for the same product again with the rounded scores subtracted gives
what rounding cut off, so that scores have twice its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adamba.ops.attention import attend


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, used: int, mask: Tensor | None, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v over the first `used` places, [sequences, heads * head_dim]; no gradient.

    q: [sequences, heads, head_dim]; k, v: [kv_heads, sequences, places, head_dim], finite in all places; mask: bool
    [1 or sequences, 1 or heads, 1, used], None where all is seen; sinks: [heads], see `sink_attention`.
    """
    if q.numel() == 0 or q.is_cuda or q.dtype != torch.bfloat16:
        keys, values = (t[:, :, :used].permute(1, 2, 0, 3) for t in (k, v))
        return attend(q[:, None], keys, values, mask, scale, sinks)[:, 0]
    kv_heads, sequences, places, head_dim = k.shape
    group = q.shape[1] // kv_heads
    q = q.unflatten(1, (kv_heads, group)).transpose(0, 1).reshape(-1, group, head_dim)
    scores = _scores(q, k.flatten(0, 1))[..., :used].mul_(scale).unflatten(0, (kv_heads, sequences))
    if mask is not None:
        scores.masked_fill_(~_by_group(mask, kv_heads), -torch.inf)
    weights = q.new_zeros(kv_heads, sequences, group, places)
    if sinks is None:
        weights[..., :used] = torch.softmax(scores, -1)
    else:
        sink = sinks.to(scores.dtype).view(kv_heads, 1, group, 1)
        total = torch.logaddexp(torch.logsumexp(scores, -1, keepdim=True), sink)
        weights[..., :used] = scores.sub_(total).exp_()
    out = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1))
    return out.unflatten(0, (kv_heads, sequences)).transpose(0, 1).reshape(sequences, -1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T to 16 bits, [n, group, places] fp32; q: [n, group, head_dim], k: [n, places, head_dim], bfloat16."""
    rounded = torch.bmm(q, k.transpose(1, 2))
    cut_off = torch.baddbmm(rounded, q, k.transpose(1, 2), beta=-1)
    return rounded.float().add_(cut_off)


def _by_group(mask: Tensor, kv_heads: int) -> Tensor:
    """[1 or sequences, 1 or heads, 1, used] -> what broadcasts over [kv_heads, sequences, group, used]."""
    mask = mask.squeeze(2)
    if mask.shape[1] == 1:
        return mask[None]
    return mask.unflatten(1, (kv_heads, -1)).transpose(0, 1)
