"""Attention with sinks: one more logit per query head takes part in the softmax and attends to nothing.

With l = logsumexp of a query's scores and s its head's sink, the output is the plain one times exp(l) / (exp(l) +
exp(s)), and the fused backward of plain attention is that of this one when it is given the output and the logsumexp
with the sink in them: the sink is a key whose value is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T, with the head's sink as a further logit) v.

    q: [batch, q, heads, head_dim]; k, v: [batch, k, kv_heads, head_dim]; sinks: [heads], not scaled; mask: bool
    [1 or batch, 1 or heads, q, k], None for causal over equal lengths, or for one query that sees all. Returns
    [batch, q, heads * head_dim].
    """
    batch, queries, heads, head_dim = q.shape
    group = heads // k.shape[2]
    k, v = (_shared_heads(t, group).transpose(1, 2) for t in (k, v))
    bias = None if mask is None else _as_bias(mask, q.dtype)
    out = _SinkAttention.apply(q.transpose(1, 2), k, v, sinks, bias, scale)
    return out.transpose(1, 2).reshape(batch, queries, heads * head_dim)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` [..., k] allows and -inf elsewhere; the fused CUDA kernel wants rows that begin on 16 bytes."""
    keys = mask.shape[-1]
    rows = torch.zeros(*mask.shape[:-1], keys + -keys % 8, dtype=dtype, device=mask.device)
    return rows[..., :keys].masked_fill_(~mask, -torch.inf)


def _shared_heads(x: Tensor, group: int) -> Tensor:
    """[batch, k, kv_heads, head_dim] with each head for its `group` query heads, without a copy."""
    if group == 1:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


class _SinkAttention(torch.autograd.Function):
    """All of [batch, heads, tokens, head_dim]; keeps what plain fused attention keeps."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, bias, scale) -> Tensor:
        # a single query without a mask sees all keys
        causal = bias is None and q.shape[2] > 1
        seeds: tuple[Tensor, ...] = ()
        if q.is_cuda:
            wide = None if bias is None else bias.expand(q.shape[0], q.shape[1], -1, -1)
            plain, total, *seeds = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, wide, True, 0.0, causal, scale=scale
            )
            total = total[..., : q.shape[2]]
        else:
            plain, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=bias, scale=scale
            )
        with_sink = torch.logaddexp(total, sinks.to(total.dtype)[:, None])
        out = plain * (total - with_sink).exp().unsqueeze(-1).to(plain.dtype)
        ctx.save_for_backward(q, k, v, sinks, bias, out, with_sink, *seeds)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, bias, out, with_sink, *seeds = ctx.saved_tensors
        if q.is_cuda:
            wide = None if bias is None else bias.expand(q.shape[0], q.shape[1], -1, -1)
            grad_q, grad_k, grad_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, wide, out, _padded(with_sink), *seeds, 0.0, [True, True, True, False], ctx.causal,
                scale=ctx.scale,
            )  # fmt: skip
        else:
            grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, with_sink, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
            )
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            along = torch.linalg.vecdot(grad.to(with_sink.dtype), out.to(with_sink.dtype))
            share = (sinks.to(with_sink.dtype)[:, None] - with_sink).exp()
            grad_sinks = -(along * share).sum((0, 2)).to(sinks.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None


def _padded(total: Tensor) -> Tensor:
    """[batch, heads, queries] lengthened to a multiple of 32, as the fused CUDA kernel keeps its logsumexp."""
    return torch.nn.functional.pad(total, (0, -total.shape[-1] % 32), value=torch.inf)
