"""Elastic self-attention: the first KV groups, each with all its query heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.cache import KVCache
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.layers.rope import rope_concentration
from megatron_adamba.ops.attention import attend
from megatron_adamba.ops.rotary import rotate_and_norm
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class NestedAttention(nn.Module):
    """Grouped-query attention with RoPE and optional QK-norm; `window` limits how far back it looks."""

    def __init__(self, config: ModelConfig, window: int | None, tp: TensorParallel = ALONE, device=None) -> None:
        super().__init__()
        self.tp, self.head_dim, self.window = tp, config.head_dim, window
        self.heads_per_group = config.num_heads // config.num_kv_groups
        first = (config.head_dim_steps or [config.head_dim])[0]
        self.norm_size, self.eps = first if config.qk_norm else None, config.norm_eps
        key = tp.owned(config.num_kv_groups) * config.head_dim
        query = key * self.heads_per_group
        # YaRN's factor on queries and on keys
        self.scale = first**-0.5 * rope_concentration(config) ** 2
        sizes = {"q": query, "k": key, "v": key}
        self.qkv = NestedLinears(sizes, config.widths[-1], config.linear_bias, device)
        heads = key // config.head_dim * self.heads_per_group
        self.sinks = nn.Parameter(torch.empty(heads, device=device)) if config.attention_sinks else None
        self.out = NestedLinears({"o": config.widths[-1]}, query, config.linear_bias, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext, cache: KVCache | None = None) -> Tensor:
        """x: [batch, seq, w] normed, in the form of the residual stream; returns the same shape."""
        width, groups = x.shape[-1], self.tp.owned(row.kv_groups)
        key = groups * self.head_dim
        query = key * self.heads_per_group
        q, k, v = self.qkv(x, (query, key, key), context.accumulation, self.tp.exchange)
        batch, seq, _ = q.shape
        q = q.view(batch, seq, groups * self.heads_per_group, self.head_dim)
        k = k.view(batch, seq, groups, self.head_dim)
        v = v.view(batch, seq, groups, self.head_dim)
        q = rotate_and_norm(q, context.cos, context.sin, self.norm_size, self.eps)
        k = rotate_and_norm(k, context.cos, context.sin, self.norm_size, self.eps)
        if cache is not None:
            k, v = cache.append(k, v)
        sinks = None if self.sinks is None else self.sinks[: groups * self.heads_per_group]
        mixed = attend(q, k, v, context.masks[self.window], self.scale, sinks)
        (out,) = self.out(mixed, (width,), context.accumulation, add_bias=self.tp.adds_bias)
        return self.tp.reduce_output(out)
