"""The static ends of the model: token embedding and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.ops.linear_cross_entropy import linear_cross_entropy, softcap_, token_losses
from megatron_adamba.ops.rms_norm import rms_norm


def head_output(x: Tensor, weight: Tensor, labels: Tensor | None, softcap: float, reduction: str) -> Tensor:
    """Logits [batch, seq, vocab] in fp32 without labels; with labels [batch, seq] their mean loss (reduction "mean"),
    or each position's loss [batch, seq] without gradient (reduction "none"), in nats. x: [batch, seq, hidden_size]."""
    if labels is None:
        logits = F.linear(x, weight)
        return softcap_(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    if reduction == "none":
        return token_losses(x.flatten(0, 1), weight, labels.flatten(), softcap).view(labels.shape)
    return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), softcap)


class TokenEmbedding(nn.Module):
    """Look-up table `weight` [vocab_size, hidden_size], optionally followed by a weightless RMSNorm."""

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float | None, device=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device))
        self.norm_eps = norm_eps

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, seq] int64; returns [batch, seq, hidden_size]."""
        x = F.embedding(tokens, self.weight)
        return x if self.norm_eps is None else rms_norm(x, None, x.shape[-1], self.norm_eps)


class Head(nn.Module):
    """Logits and losses from a matrix of its own, `weight` [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, softcap: float, device=None) -> None:
        super().__init__()
        self.softcap = softcap
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device))

    def forward(self, x: Tensor, labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """See `head_output`."""
        return head_output(x, self.weight, labels, self.softcap, reduction)


class TiedEmbedding(TokenEmbedding):
    """One matrix for both ends. Called with `as_head` it is the head, so that whoever gathers a module's parameters
    around its call gathers this one at both ends."""

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float | None, softcap: float, device=None) -> None:
        super().__init__(vocab_size, hidden_size, norm_eps, device)
        self.softcap = softcap

    def forward(
        self, x: Tensor, labels: Tensor | None = None, reduction: str = "mean", as_head: bool = False
    ) -> Tensor:
        """tokens [batch, seq] to [batch, seq, hidden_size], or as the head: see `head_output`."""
        if as_head:
            return head_output(x, self.weight, labels, self.softcap, reduction)
        return super().forward(x)
