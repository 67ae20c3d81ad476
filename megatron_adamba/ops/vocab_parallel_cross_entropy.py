"""Head and cross entropy where each rank holds some rows of the vocabulary: none ever sees all logits of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.ops.exchange import VocabularyExchange
from megatron_adamba.ops.linear_cross_entropy import IGNORED, WeightGradient, capped_copy, chunk_size, row_blocks


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the vocabulary a rank holds, and how it meets the others."""

    vocab_size: int
    """of all ranks together"""
    first_row: int
    exchange: VocabularyExchange


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float,
    shard: VocabularyShard,
    losses_out: Tensor | None = None,
) -> Tensor:
    """`linear_cross_entropy` over a shared vocabulary: the same mean loss on every rank.

    hidden: [batch, seq, hidden_size], what this rank holds of it; weight: [rows of this rank, hidden_size], from
    shard.first_row of the vocabulary on; labels: [batch, seq] of all tokens; losses_out: [batch, seq], filled with each
    position's loss.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _VocabParallelCrossEntropy.apply(hidden, weight, labels, softcap, shard, losses_out)
    losses = vocab_parallel_token_losses(hidden, weight, labels, softcap, shard)
    if losses_out is not None:
        losses_out.copy_(losses)
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def vocab_parallel_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, shard: VocabularyShard
) -> Tensor:
    """Cross entropy of each position, [batch, seq], zero where the label is IGNORED. No gradient."""
    with torch.no_grad():
        whole = shard.exchange.gather(hidden).flatten(0, 1)
        flat = labels.flatten()
        losses = torch.zeros(flat.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        step = chunk_size(shard.vocab_size)
        for start in range(0, flat.numel(), step):
            part = slice(start, start + step)
            losses[part] = _Chunk(whole[part], weight, flat[part], softcap, shard).losses
        return losses.view(labels.shape)


class _Chunk:
    """This rank's logits of some tokens, [tokens, rows], and the losses over the whole vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, shard: VocabularyShard) -> None:
        self.logits = hidden @ weight.t()
        self.softcap = softcap
        place = labels - shard.first_row
        self.here = (place >= 0) & (place < weight.shape[0])
        self.index = torch.where(self.here, place, 0).unsqueeze(-1)
        self.scored = labels != IGNORED
        peak, total, target = self._own_part()
        peaks, totals, targets = shard.exchange.gather_parts(torch.stack([peak, total, target])).unbind(1)
        top = peaks.amax(0)
        self.log_total = (totals * (peaks - top).exp()).sum(0).log() + top
        self.losses = (self.log_total - targets.sum(0)) * self.scored

    def _own_part(self) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, sum of exp(logit - largest) and the label's logit (0 where another rank has it), [tokens]."""
        tokens = self.logits.shape[0]
        high = torch.promote_types(self.logits.dtype, torch.float32)
        peak, total, target = torch.empty(3, tokens, dtype=high, device=self.logits.device)
        blocks = row_blocks(self.logits)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            capped = capped_copy(self.logits[rows], self.softcap)[0]
            target[rows] = capped.gather(-1, self.index[rows]).squeeze(-1) * self.here[rows]
            peak[rows] = capped.amax(-1)
            total[rows] = capped.sub_(peak[rows].unsqueeze(-1)).exp_().sum(-1)
        return peak, total, target

    def gradient(self, grad_scale: Tensor) -> Tensor:
        """grad_scale * d sum(losses) / d logits, [tokens, rows], in the logits' memory."""
        blocks = row_blocks(self.logits)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            capped, bounded = capped_copy(self.logits[rows], self.softcap)
            weight = (self.scored[rows] * grad_scale).unsqueeze(-1)
            grad = capped.sub_(self.log_total[rows].unsqueeze(-1)).exp_().mul_(weight)
            grad.scatter_add_(-1, self.index[rows], -weight * self.here[rows].unsqueeze(-1))
            if bounded is not None:
                grad.addcmul_(grad * bounded, bounded, value=-1)
            self.logits[rows] = grad
        return self.logits


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap, shard, losses_out) -> Tensor:
        high = torch.promote_types(hidden.dtype, torch.float32)
        whole, flat = shard.exchange.gather(hidden).flatten(0, 1), labels.flatten()
        grad_scale = (flat != IGNORED).sum().clamp(min=1).to(high).reciprocal()
        total = hidden.new_zeros((), dtype=high)
        step = chunk_size(shard.vocab_size)
        grad_whole = torch.empty_like(whole) if ctx.needs_input_grad[0] else None
        grad_weight = WeightGradient(weight, flat.numel() <= step) if ctx.needs_input_grad[1] else None
        for start in range(0, flat.numel(), step):
            part = slice(start, start + step)
            chunk = _Chunk(whole[part], weight, flat[part], softcap, shard)
            total += chunk.losses.sum()
            if losses_out is not None:
                losses_out.view(-1)[part] = chunk.losses
            grad_logits = chunk.gradient(grad_scale)
            if grad_whole is not None:
                torch.mm(grad_logits, weight, out=grad_whole[part])
            if grad_weight is not None:
                grad_weight.add(grad_logits, whole[part])
        ctx.save_for_backward(grad_whole, None if grad_weight is None else grad_weight.result())
        ctx.exchange, ctx.shape, ctx.weight_dtype = shard.exchange, labels.shape, weight.dtype
        return total * grad_scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        reduced = None
        if grad_hidden is not None:
            reduced = ctx.exchange.start_reduce((grad_hidden * grad).view(*ctx.shape, grad_hidden.shape[-1]))
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return None if reduced is None else reduced.wait(), grad_weight, None, None, None, None
