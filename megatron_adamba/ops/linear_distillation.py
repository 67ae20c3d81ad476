"""Head, cross entropy and distillation in one: a pass learns from a text and from another pass's predictions. Logits of
both exist for one chunk of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.ops.linear_cross_entropy import IGNORED, WeightGradient, capped_copy, chunk_size, row_blocks
from megatron_adamba.ops.vocab_parallel_cross_entropy import VocabularyShard


@dataclass(frozen=True)
class DistillationLoss:
    """(1 - share) * cross entropy + share * temperature^2 * divergence, a position (Hinton et al., arXiv 1503.02531,
    section 2: the square keeps the size of gradients)."""

    share: float
    """of the divergence, 0 to 1"""
    temperature: float = 1.0
    """that both predictions are divided by in the divergence"""
    reverse: bool = False
    """KL(pass || teacher), which seeks a mode (Gu et al., arXiv 2306.08543), in place of KL(teacher || pass)"""


@dataclass(frozen=True)
class Teacher:
    """Whose predictions are learned. Nothing of it gets a gradient."""

    hidden: Tensor
    """[batch, seq, its hidden_size], normed, in the form of the residual stream"""
    weight: Tensor
    """[vocab, its hidden_size], or this rank's rows of it"""
    softcap: float = 0.0


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher,
    loss: DistillationLoss,
    softcap: float = 0.0,
    shard: VocabularyShard | None = None,
    chunk_tokens: int | None = None,
    losses_out: Tensor | None = None,
    divergences_out: Tensor | None = None,
) -> Tensor:
    """Mean of `loss` in nats over the scored positions, a scalar in fp32 (float64 for float64 input).

    hidden: [batch, seq, hidden_size], normed, what this rank holds of it; weight: [vocab, hidden_size], or with `shard`
    this rank's rows of it; labels: [batch, seq] of all tokens, IGNORED where nothing is scored, and nothing is
    distilled. chunk_tokens: positions of one chunk. losses_out, divergences_out: [batch, seq], filled with each
    position's cross entropy, and with its divergence at the temperature, zero where nothing is scored. What stays for
    the backward pass has the size of `hidden` and `weight`.
    """
    step = chunk_tokens or chunk_size(weight.shape[0] if shard is None else shard.vocab_size)
    outs = (losses_out, divergences_out)
    return _LinearDistillation.apply(
        hidden, weight, labels, teacher, loss, softcap, shard, step, outs, torch.is_grad_enabled()
    )


class _Chunk:
    """This rank's logits of some tokens from both heads, [tokens, rows], and what they come to over all ranks."""

    def __init__(
        self,
        logits: Tensor,
        theirs: Tensor,
        labels: Tensor,
        loss: DistillationLoss,
        softcaps: tuple[float, float],
        shard: VocabularyShard | None,
    ) -> None:
        self.logits, self.theirs, self.loss, self.softcaps = logits, theirs, loss, softcaps
        place = labels if shard is None else labels - shard.first_row
        self.here = (place >= 0) & (place < logits.shape[1])
        self.index = torch.where(self.here, place, 0).unsqueeze(-1)
        self.scored = labels != IGNORED
        parts = self._own_parts()
        self._combine(parts[None] if shard is None else shard.exchange.gather_parts(parts))

    def _own_parts(self) -> Tensor:
        """[7, tokens]: largest logit, sum of exp(logit - largest), the same with the difference over the temperature,
        the label's logit (0 where another rank has it); the teacher's largest and its sum over the temperature; sum of
        exp((p - largest) / temperature) (p - q) / temperature, where p is who the divergence is the mean of."""
        tokens = self.logits.shape[0]
        high = torch.promote_types(self.logits.dtype, torch.float32)
        parts = torch.empty(7, tokens, dtype=high, device=self.logits.device)
        heat = self.loss.temperature
        blocks = row_blocks(self.logits)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            ours, theirs = (
                capped_copy(self.logits[rows], self.softcaps[0])[0],
                capped_copy(self.theirs[rows], self.softcaps[1])[0],
            )
            target = ours.gather(-1, self.index[rows]).squeeze(-1) * self.here[rows]
            peak, their_peak = ours.amax(-1), theirs.amax(-1)
            total = (ours - peak[:, None]).exp_().sum(-1)
            difference = (ours - theirs if self.loss.reverse else theirs - ours).div_(heat)
            ours, theirs = (x.sub_(top[:, None]).div_(heat).exp_() for x, top in ((ours, peak), (theirs, their_peak)))
            moment = torch.linalg.vecdot(ours if self.loss.reverse else theirs, difference)
            found = [peak, total, ours.sum(-1), target, their_peak, theirs.sum(-1), moment]
            parts[:, rows] = torch.stack(found)
        return parts

    def _combine(self, parts: Tensor) -> None:
        """parts: [ranks, 7, tokens]."""
        heat = self.loss.temperature
        peak, total, warm_total, target, their_peak, their_total, moment = parts.unbind(1)
        top, their_top = peak.amax(0), their_peak.amax(0)
        self.log_total = (total * (peak - top).exp()).sum(0).log() + top
        shares, their_shares = ((peak - top) / heat).exp(), ((their_peak - their_top) / heat).exp()
        whole, their_whole = (warm_total * shares).sum(0), (their_total * their_shares).sum(0)
        self.warm_log_total = whole.log() + top / heat
        self.their_log_total = their_whole.log() + their_top / heat
        if self.loss.reverse:
            mean = (moment * shares).sum(0) / whole - self.warm_log_total + self.their_log_total
        else:
            mean = (moment * their_shares).sum(0) / their_whole - self.their_log_total + self.warm_log_total
        # rounding leaves none under 0
        self.divergences = mean.clamp(min=0) * self.scored
        self.entropies = (self.log_total - target.sum(0)) * self.scored
        share = self.loss.share
        self.losses = (1 - share) * self.entropies + share * heat**2 * self.divergences

    def gradient(self, grad_scale: Tensor) -> Tensor:
        """grad_scale * d sum(losses) / d logits, [tokens, rows], in the logits' memory.

        With p of the pass and q of the teacher at the temperature, the divergence's own is (p - q) / temperature, or in
        reverse p (log p - log q - divergence) / temperature.
        """
        share, heat = self.loss.share, self.loss.temperature
        blocks = row_blocks(self.logits)
        for start in blocks:
            rows = slice(start, start + blocks.step)
            capped, bounded = capped_copy(self.logits[rows], self.softcaps[0])
            theirs = capped_copy(self.theirs[rows], self.softcaps[1])[0]
            scale = (self.scored[rows] * grad_scale).unsqueeze(-1)
            log_p = capped / heat - self.warm_log_total[rows, None]
            log_q = theirs.div_(heat).sub_(self.their_log_total[rows, None])
            if self.loss.reverse:
                distilled = log_p.exp().mul_(log_p - log_q - self.divergences[rows, None])
            else:
                distilled = log_p.exp_().sub_(log_q.exp_())
            grad = capped.sub_(self.log_total[rows, None]).exp_()
            grad.scatter_add_(-1, self.index[rows], -self.here[rows, None].to(grad.dtype))
            grad.mul_((1 - share) * scale).add_(distilled.mul_(share * heat * scale))
            if bounded is not None:
                grad.addcmul_(grad * bounded, bounded, value=-1)
            self.logits[rows] = grad
        return self.logits


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher: Teacher,
        loss: DistillationLoss,
        softcap: float,
        shard: VocabularyShard | None,
        step: int,
        outs: tuple[Tensor | None, Tensor | None],
        with_gradient: bool,
    ) -> Tensor:
        gather = (lambda x: x) if shard is None else shard.exchange.gather
        whole, theirs = gather(hidden).flatten(0, 1), gather(teacher.hidden.detach()).flatten(0, 1)
        flat = labels.flatten()
        high = torch.promote_types(hidden.dtype, torch.float32)
        grad_scale = (flat != IGNORED).sum().clamp(min=1).to(high).reciprocal()
        total = hidden.new_zeros((), dtype=high)
        grad_whole = torch.empty_like(whole) if with_gradient and ctx.needs_input_grad[0] else None
        grad_weight = None
        if with_gradient and ctx.needs_input_grad[1]:
            grad_weight = WeightGradient(weight, flat.numel() <= step)
        for start in range(0, flat.numel(), step):
            part = slice(start, start + step)
            logits, their_logits = whole[part] @ weight.t(), theirs[part] @ teacher.weight.detach().t()
            chunk = _Chunk(logits, their_logits, flat[part], loss, (softcap, teacher.softcap), shard)
            total += chunk.losses.sum()
            for out, values in zip(outs, (chunk.entropies, chunk.divergences)):
                if out is not None:
                    out.view(-1)[part] = values
            if grad_whole is None and grad_weight is None:
                continue
            grad_logits = chunk.gradient(grad_scale)
            if grad_whole is not None:
                torch.mm(grad_logits, weight, out=grad_whole[part])
            if grad_weight is not None:
                grad_weight.add(grad_logits, whole[part])
        ctx.save_for_backward(grad_whole, None if grad_weight is None else grad_weight.result())
        ctx.shard, ctx.shape, ctx.weight_dtype = shard, labels.shape, weight.dtype
        return total * grad_scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).view(*ctx.shape, grad_hidden.shape[-1])
            if ctx.shard is not None:
                grad_hidden = ctx.shard.exchange.start_reduce(grad_hidden).wait()
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *(None,) * 8
