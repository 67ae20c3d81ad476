"""The decays of Mamba-2's chunked scan, between the tokens of a chunk and between chunks (`ops/ssd.py`)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkDecay(NamedTuple):
    """One chunk's decays, all in the accumulation dtype, all at most 1; a document's end cuts them to 0."""

    pairs: Tensor  # [batch, groups, heads, chunk, chunk]: from token j to token i, 0 for j > i
    from_start: Tensor  # [batch, chunk, groups, heads]: from the state before the chunk to token i
    to_end: Tensor  # [batch, chunk, groups, heads]: from token j to the state after the chunk
    across: Tensor  # [batch, groups, heads]: from the state before the chunk to the one after it


def _exp_or_zero(exponent: Tensor) -> Tensor:
    """exp of what is at most 0 or -inf, in place, and 0 where it is so small that its products may be subnormal.

    CPUs take up to forty times as long over subnormal numbers, and for -inf PyTorch's exp three times. The cut is at
    the 0.75th power of the smallest normal number, 4e-29 in float32: nothing beside which anything else would count.
    """
    lowest = 0.75 * math.log(torch.finfo(exponent.dtype).tiny)
    return F.threshold(exponent.clamp_(min=lowest).exp_(), math.exp(lowest + 1e-3), 0.0, inplace=True)


class Decays:
    """What every chunk's decays come from, for the whole sequence at once: tensors of one number a token and head.

    log_decay [batch, seq, groups, heads]: a_t; seq_idx [batch, seq] or None; `size` tokens to a chunk, the last one's
    missing tokens without decay.
    """

    def __init__(self, log_decay: Tensor, seq_idx: Tensor | None, size: int):
        acc = log_decay.dtype
        batch, seq, groups, heads = log_decay.shape
        chunks = -(-seq // size)
        missing = chunks * size - seq
        steps = F.pad(log_decay, (0, 0, 0, 0, 0, missing)).view(batch, chunks, size, groups, heads)
        total = steps.double().cumsum(dim=2)
        last = total[:, :, -1]
        # After strong decays the sums are large and the differences that matter small. So each sum is split into a
        # multiple of 1/16, whose differences are exact, and a rest under 1/16.
        by_head = total.permute(0, 1, 3, 4, 2).contiguous()  # [batch, chunks, groups, heads, size]
        self.coarse = by_head.mul(16).round_().div_(16).to(acc)
        self.rest = (by_head - self.coarse).to(acc)
        self.from_start, self.to_end, self.across = (
            _exp_or_zero(t.to(acc, copy=True)) for t in (total, last.unsqueeze(2) - total, last)
        )
        # -inf before exp, not 0 after it: above the diagonal the difference is positive and may overflow.
        self.causal = torch.full((size, size), float("-inf"), dtype=acc, device=log_decay.device).triu_(1)
        self.idx: Tensor | None = None
        if seq_idx is not None:
            self.idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, missing)], dim=1).view(batch, chunks, size)
            self._cut_at_documents(self.idx)

    def _cut_at_documents(self, idx: Tensor) -> None:
        """Nothing passes from one document to the next; the state before the first chunk is the first document's."""
        end = idx[:, :, -1]
        seen = torch.cat([idx[:, :1, 0], end[:, :-1]], dim=1)
        self.from_start *= (idx == seen.unsqueeze(-1))[..., None, None]
        self.to_end *= (idx == end.unsqueeze(-1))[..., None, None]
        self.across *= (end == seen)[..., None, None]

    def of_chunk(self, i: int, length: int) -> ChunkDecay:
        """The decays of chunk i, which has `length` tokens."""
        coarse, rest = self.coarse[:, i, ..., :length], self.rest[:, i, ..., :length]
        pairs = coarse.unsqueeze(-1) - coarse.unsqueeze(-2)
        pairs.add_(rest.unsqueeze(-1)).sub_(rest.unsqueeze(-2))
        mask = self.causal[:length, :length]
        if self.idx is not None:
            idx = self.idx[:, i, :length]
            mask = mask.masked_fill(idx.unsqueeze(-1) != idx.unsqueeze(-2), float("-inf"))[:, None, None]
        pairs = _exp_or_zero(pairs.add_(mask))
        return ChunkDecay(pairs, self.from_start[:, i, :length], self.to_end[:, i, :length], self.across[:, i])
