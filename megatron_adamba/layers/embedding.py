"""The static ends of the model: token embedding and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import vocab_unit
from megatron_adamba.layers.lesson import Lesson
from megatron_adamba.ops.head_divergence import head_divergence
from megatron_adamba.ops.linear_cross_entropy import linear_cross_entropy, softcap_, token_losses
from megatron_adamba.ops.linear_distillation import Teacher, linear_distillation
from megatron_adamba.ops.rms_norm import rms_norm
from megatron_adamba.ops.vocab_parallel_cross_entropy import (
    VocabularyShard,
    vocab_parallel_cross_entropy,
    vocab_parallel_token_losses,
)
from megatron_adamba.parallel.layout import contiguous_rows
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class Vocabulary:
    """The rows of a vocabulary that this rank holds."""

    def __init__(self, vocab_size: int, tp: TensorParallel) -> None:
        self.tp, self.size = tp, vocab_size
        self.first, end = contiguous_rows(vocab_size, vocab_unit(vocab_size), tp.size, tp.rank)
        self.rows = end - self.first

    def look_up(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """weight[tokens], [batch, seq, hidden_size] in the form of the residual stream. tokens: [batch, seq]."""
        if self.tp.size == 1:
            return F.embedding(tokens, weight)
        place = tokens - self.first
        elsewhere = (place < 0) | (place >= self.rows)
        x = F.embedding(place.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.tp.reduce_output(x)

    def head_output(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor | None,
        softcap: float,
        reduction: str,
        losses: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] in fp32 without labels; with labels [batch, seq] their mean loss (reduction
        "mean"), or each position's loss [batch, seq] without gradient (reduction "none"), in nats. losses: [batch, seq]
        in fp32, filled with each position's loss beside the mean. lesson: what a mean loss also learns from; its states
        come from in front of this same head.

        x: [batch, seq, hidden_size] in the form of the residual stream. Only the first of the three ever holds the
        logits of a whole vocabulary; under tensor parallelism it has no gradient.

        Reduction "divergence" takes states x: [states, tokens, hidden_size], whole on every rank, and gives how far
        each but the last lies from the last, [states - 1, tokens]: see `head_divergence`.
        """
        if reduction == "divergence":
            shard = VocabularyShard(self.size, self.first, self.tp) if self.tp.size > 1 else None
            return head_divergence(x, weight, softcap, shard)
        if lesson is not None and labels is not None and reduction == "mean":
            shard = VocabularyShard(self.size, self.first, self.tp) if self.tp.size > 1 else None
            teacher = Teacher(lesson.taught(), weight, softcap)
            return linear_distillation(x, weight, labels, teacher, lesson.loss, softcap, shard, losses_out=losses)
        if labels is None:
            logits = self._logits(x, weight)
            return softcap_(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
        if self.tp.size > 1:
            shard = VocabularyShard(self.size, self.first, self.tp)
            if reduction == "none":
                return vocab_parallel_token_losses(x, weight, labels, softcap, shard)
            return vocab_parallel_cross_entropy(x, weight, labels, softcap, shard, losses)
        if reduction == "none":
            return token_losses(x.flatten(0, 1), weight, labels.flatten(), softcap).view(labels.shape)
        flat = None if losses is None else losses.view(-1)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), softcap, losses_out=flat)

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.linear(x, weight)
        with torch.no_grad():
            x = self.tp.gather(x)
            largest = -(-self.size // self.tp.size) + vocab_unit(self.size)
            own = F.linear(x, F.pad(weight, (0, 0, 0, largest - self.rows)))
            parts = self.tp.gather_parts(own)
            bounds = [contiguous_rows(self.size, vocab_unit(self.size), self.tp.size, r) for r in range(self.tp.size)]
            return torch.cat([part[..., : end - first] for part, (first, end) in zip(parts, bounds)], dim=-1)


class TokenEmbedding(nn.Module):
    """Look-up table `weight` [vocab_size, hidden_size], followed by a weightless RMSNorm where `norm` gives its
    norm_size and epsilon."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        norm: tuple[int, float] | None,
        tp: TensorParallel = ALONE,
        device=None,
    ) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(vocab_size, tp)
        self.weight = nn.Parameter(torch.empty(self.vocabulary.rows, hidden_size, device=device))
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, seq] int64; returns [batch, seq, hidden_size] in the form of the residual stream."""
        x = self.vocabulary.look_up(tokens, self.weight)
        return x if self.norm is None else rms_norm(x, None, *self.norm)


class Head(nn.Module):
    """Logits and losses from a matrix of its own, `weight` [vocab_size, hidden_size]."""

    def __init__(
        self, vocab_size: int, hidden_size: int, softcap: float, tp: TensorParallel = ALONE, device=None
    ) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(vocab_size, tp)
        self.softcap = softcap
        self.weight = nn.Parameter(torch.empty(self.vocabulary.rows, hidden_size, device=device))

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        reduction: str = "mean",
        losses: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """See `Vocabulary.head_output`."""
        return self.vocabulary.head_output(x, self.weight, labels, self.softcap, reduction, losses, lesson)


class TiedEmbedding(TokenEmbedding):
    """One matrix for both ends. Called with `as_head` it is the head, so that whoever gathers a module's parameters
    around its call gathers this one at both ends."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        norm: tuple[int, float] | None,
        softcap: float,
        tp: TensorParallel = ALONE,
        device=None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, norm, tp, device)
        self.softcap = softcap

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        reduction: str = "mean",
        losses: Tensor | None = None,
        lesson: Lesson | None = None,
        as_head: bool = False,
    ) -> Tensor:
        """tokens [batch, seq] to [batch, seq, hidden_size], or as the head: see `Vocabulary.head_output`."""
        if as_head:
            return self.vocabulary.head_output(x, self.weight, labels, self.softcap, reduction, losses, lesson)
        return super().forward(x)
