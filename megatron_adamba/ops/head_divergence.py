"""How far the head's predictions from one state lie from those from another, without the logits of all states."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adamba.ops.linear_cross_entropy import chunk_size, row_blocks, softcap_
from megatron_adamba.ops.vocab_parallel_cross_entropy import VocabularyShard


def head_divergence(
    states: Tensor, weight: Tensor, softcap: float = 0.0, shard: VocabularyShard | None = None
) -> Tensor:
    """KL(last || state) = sum_v p_last(v) (log p_last(v) - log p_state(v)) in nats (Cover and Thomas 2006, eq. 2.26)
    of each state but the last, [states - 1, tokens] in fp32 or better. No gradient.

    states: [states, tokens, hidden_size], whole on every rank; weight: [vocab, hidden_size], or with `shard` this
    rank's rows of it. The logits of two states of one chunk of tokens exist at a time.
    """
    with torch.no_grad():
        count, tokens = states.shape[:2]
        high = torch.promote_types(states.dtype, torch.float32)
        divergences = torch.empty(count - 1, tokens, dtype=high, device=states.device)
        step = chunk_size(shard.vocab_size if shard is not None else weight.shape[0])
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            last = states[-1, part] @ weight.t()
            for index in range(count - 1):
                parts = _own_part(last, states[index, part] @ weight.t(), softcap)
                together = parts[None] if shard is None else shard.exchange.gather_parts(parts)
                divergences[index, part] = _combined(together)
        return divergences


def _own_part(last: Tensor, other: Tensor, softcap: float) -> Tensor:
    """[5, tokens] of logits [tokens, rows]: largest and sum of exp(logit - largest) of both, and
    sum of exp(last - largest) (last - other)."""
    high = torch.promote_types(last.dtype, torch.float32)
    parts = torch.empty(5, last.shape[0], dtype=high, device=last.device)
    blocks = row_blocks(*last.shape, last.device)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        ours, theirs = (softcap_(logits[rows].to(high, copy=True), softcap) for logits in (last, other))
        peak, other_peak = ours.amax(-1), theirs.amax(-1)
        likely = (ours - peak[:, None]).exp_()
        moment = (likely * ours.sub_(theirs)).sum(-1)
        other_total = theirs.sub_(other_peak[:, None]).exp_().sum(-1)
        parts[:, rows] = torch.stack([peak, likely.sum(-1), other_peak, other_total, moment])
    return parts


def _combined(parts: Tensor) -> Tensor:
    """[tokens] from what every rank found in its rows, [ranks, 5, tokens]; rounding leaves none under 0."""
    peak, total, other_peak, other_total, moment = parts.unbind(1)
    top, other_top = peak.amax(0), other_peak.amax(0)
    share = (peak - top).exp()
    whole = (total * share).sum(0)
    log_whole = whole.log() + top
    other_log_whole = (other_total * (other_peak - other_top).exp()).sum(0).log() + other_top
    return ((moment * share).sum(0) / whole - log_whole + other_log_whole).clamp(min=0)
