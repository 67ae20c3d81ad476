"""Elastic self-attention: the first KV groups, each with all its query heads."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.cache import KVCache
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.ops.attention import attend
from megatron_adamba.ops.rotary import rotate_and_norm


class NestedAttention(nn.Module):
    """Grouped-query attention with RoPE and optional QK-norm; `window` limits how far back it looks."""

    def __init__(self, config: ModelConfig, window: int | None, device=None) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        self.heads_per_group = config.num_heads // config.num_kv_groups
        self.qk_norm, self.eps = config.qk_norm, config.norm_eps
        query, key = config.num_heads * config.head_dim, config.num_kv_groups * config.head_dim
        sizes = {"q": query, "k": key, "v": key}
        self.qkv = NestedLinears(sizes, config.hidden_size, config.linear_bias, device)
        self.out = NestedLinears({"o": config.hidden_size}, query, config.linear_bias, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext, cache: KVCache | None = None) -> Tensor:
        """x: [batch, seq, w] normed; returns [batch, seq, w]."""
        batch, seq, width = x.shape
        groups = row.kv_groups
        query, key = groups * self.heads_per_group * self.head_dim, groups * self.head_dim
        q, k, v = self.qkv(x, (query, key, key), context.accumulation)
        q = q.view(batch, seq, groups * self.heads_per_group, self.head_dim)
        k = k.view(batch, seq, groups, self.head_dim)
        v = v.view(batch, seq, groups, self.head_dim)
        q = rotate_and_norm(q, context.cos, context.sin, self.qk_norm, self.eps)
        k = rotate_and_norm(k, context.cos, context.sin, self.qk_norm, self.eps)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = attend(q, k, v, context.masks[self.window], self.head_dim**-0.5)
        (out,) = self.out(mixed, (width,), context.accumulation)
        return out
