"""Causal attention on a CPU as batched matmuls over blocks of queries, for training at moderate lengths.

The library's CPU kernel computes its products in small tiles, far below the rate of its own matmuls; at 512 tokens
blocks of queries against all the keys before them take half its time, at 4096 they take the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128
SHORTEST, LONGEST = 64, 2048
"""lengths between which this is the faster way"""


def blocks_serve(q: Tensor, k: Tensor) -> bool:
    """Whether `causal_attention` is the better choice; q: [batch, seq, heads, head_dim], k: [batch, keys, ...]."""
    length = q.shape[1]
    return q.device.type == "cpu" and length == k.shape[1] and SHORTEST <= length <= LONGEST


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys up to each query, each KV head serving a group of query heads.

    q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim]. Returns [batch, seq, heads * head_dim].
    Products round to q's dtype, the softmax and the sums over blocks are in fp32 or better. Differentiable once.
    """
    return _CausalAttention.apply(q, k, v, scale)


def _pack(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, head_dim] to [batch * kv_heads, seq * group, head_dim]: a position's rows lie together."""
    batch, seq, heads, head_dim = x.shape
    grouped = x.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim).transpose(1, 2)
    return grouped.reshape(batch * kv_heads, -1, head_dim)


def _unpack(x: Tensor, shape: torch.Size, kv_heads: int) -> Tensor:
    """The inverse of `_pack`; shape: [batch, seq, heads, head_dim]."""
    batch, seq, heads, head_dim = shape
    return x.view(batch, kv_heads, seq, heads // kv_heads, head_dim).transpose(1, 2).reshape(shape)


class _Block:
    """Queries start .. end - 1 of a packed sequence and what they have to do with the keys 0 .. end - 1."""

    def __init__(self, start: int, seq: int, group: int) -> None:
        self.start, self.end = start, min(start + QUERY_BLOCK, seq)
        self.rows = slice(self.start * group, self.end * group)
        self.group = group

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[batch * kv_heads, rows, end] in fp32 or better, -inf where a key lies ahead."""
        scores = torch.bmm(q[:, self.rows], k[:, : self.end].transpose(1, 2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
        size = self.end - self.start
        ahead = torch.ones(size, size, dtype=torch.bool).triu_(1).repeat_interleave(self.group, dim=0)
        scores[:, :, self.start :].masked_fill_(ahead, float("-inf"))
        return scores


def _blocks(seq: int, group: int) -> list[_Block]:
    return [_Block(start, seq, group) for start in range(0, seq, QUERY_BLOCK)]


class _CausalAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one number a query; backward computes the probabilities anew."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
        pq, pk, pv = (_pack(x, kv_heads) for x in (q, k, v))
        out = torch.empty_like(pq)
        log_sum = pq.new_empty(*pq.shape[:2], 1, dtype=torch.promote_types(q.dtype, torch.float32))
        for block in _blocks(q.shape[1], group):
            weights = block.scores(pq, pk, scale)
            peak = weights.amax(-1, keepdim=True)
            weights.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            log_sum[:, block.rows] = peak + total.log()
            out[:, block.rows] = torch.bmm(weights.div_(total).to(q.dtype), pv[:, : block.end])
        out = _unpack(out, q.shape, kv_heads).flatten(2)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, log_sum = ctx.saved_tensors
        kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
        pq, pk, pv = (_pack(x, kv_heads) for x in (q, k, v))
        d_out = _pack(grad.reshape(q.shape), kv_heads)
        # sum over keys of probability times its gradient, which is also gradient times output
        mean = torch.linalg.vecdot(d_out.to(log_sum.dtype), _pack(out.view(q.shape), kv_heads).to(log_sum.dtype))
        mean = mean.unsqueeze(-1)
        dq = torch.empty_like(pq)
        dk, dv = (torch.zeros(x.shape, dtype=log_sum.dtype, device=x.device) for x in (pk, pv))
        for block in _blocks(q.shape[1], group):
            rows, end = block.rows, block.end
            weights = block.scores(pq, pk, ctx.scale).sub_(log_sum[:, rows]).exp_()
            dv[:, :end] += torch.bmm(weights.to(q.dtype).transpose(1, 2), d_out[:, rows])
            d_weights = torch.bmm(d_out[:, rows], pv[:, :end].transpose(1, 2)).to(log_sum.dtype)
            d_scores = d_weights.sub_(mean[:, rows]).mul_(weights).mul_(ctx.scale).to(q.dtype)
            dq[:, rows] = torch.bmm(d_scores, pk[:, :end])
            dk[:, :end] += torch.bmm(d_scores.transpose(1, 2), pq[:, rows])
        grads = (_unpack(dx.to(x.dtype), x.shape, kv_heads) for dx, x in ((dq, q), (dk, k), (dv, v)))
        return *grads, None
