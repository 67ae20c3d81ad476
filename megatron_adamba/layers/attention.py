"""Elastic self-attention: the first KV groups, each with all its query heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.layers.rope import rope_concentration
from megatron_adamba.ops.attention import attend
from megatron_adamba.ops.cached_attention import cached_attention
from megatron_adamba.ops.rotary import rotate_and_norm
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class NestedAttention(nn.Module):
    """Grouped-query attention with RoPE and optional QK-norm; `window` limits how far back it looks."""

    def __init__(self, config: ResolvedModel, window: int | None, tp: TensorParallel = ALONE, device=None) -> None:
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

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, w] normed, in the form of the residual stream; returns the same shape."""
        groups = self.tp.owned(row.kv_groups)
        key = groups * self.head_dim
        query = key * self.heads_per_group
        q, k, v = self.qkv(x, (query, key, key), context.accumulation, self.tp.exchange)
        q, k = (self._heads(t, context.cos, context.sin) for t in (q, k))
        mixed = attend(
            q, k, v.unflatten(-1, (groups, self.head_dim)), context.masks[self.window], self.scale, self._sinks(groups)
        )
        (out,) = self.out(mixed, (x.shape[-1],), context.accumulation, add_bias=self.tp.adds_bias)
        return self.tp.reduce_output(out)

    def keys_values(self, x: Tensor, row: NestRow, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What later tokens read of x, each [batch, seq, kv_groups, head_dim]. Decoding alone, with all units here.

        x: [batch, seq, w] normed; cos, sin: [seq, head_dim / 2].
        """
        key = row.kv_groups * self.head_dim
        k, v = self.qkv.some(x, {"k": key, "v": key})
        return self._heads(k, cos, sin), v.unflatten(-1, (row.kv_groups, self.head_dim))

    def queries(self, x: Tensor, row: NestRow, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, seq, heads, head_dim]; like `keys_values`."""
        (q,) = self.qkv.some(x, {"q": row.kv_groups * self.heads_per_group * self.head_dim})
        return self._heads(q, cos, sin)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, row: NestRow) -> Tensor:
        """What queries [batch, q, heads, head_dim] find, [batch, q, w]; the others as `attend` has them. Decoding
        alone."""
        mixed = attend(q, k, v, mask, self.scale, self._sinks(row.kv_groups))
        (out,) = self.out.some(mixed, {"o": row.width})
        return out

    def read_cache(self, q: Tensor, k: Tensor, v: Tensor, used: int, mask: Tensor | None, row: NestRow) -> Tensor:
        """What the one query of each sequence finds, [sequences, w]; the others as `cached_attention` has them."""
        mixed = cached_attention(q, k, v, used, mask, self.scale, self._sinks(row.kv_groups))
        (out,) = self.out.some(mixed, {"o": row.width})
        return out

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_and_norm(x.unflatten(-1, (-1, self.head_dim)), cos, sin, self.norm_size, self.eps)

    def _sinks(self, groups: int) -> Tensor | None:
        return None if self.sinks is None else self.sinks[: groups * self.heads_per_group]
