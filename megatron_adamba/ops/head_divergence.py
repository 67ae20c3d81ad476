"""How far the head's predictions from one state lie from those from another, without the logits of all states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_adamba.ops.linear_cross_entropy import chunk_size, row_blocks, softcap_
from megatron_adamba.ops.vocab_parallel_cross_entropy import VocabularyShard

_BLOCK_ELEMENTS = 1 << 22
"""logits that a GPU works on at a time, in four fp32 copies"""


def head_divergence(
    states: Tensor, weight: Tensor, softcap: float = 0.0, shard: VocabularyShard | None = None
) -> Tensor:
    """KL(last || state) = sum_v p_last(v) (log p_last(v) - log p_state(v)) in nats (Cover and Thomas 2006, eq. 2.26)
    of each state but the last, [states - 1, tokens] in fp32 or better. No gradient.

    states: [states, tokens, hidden_size], whole on every rank; weight: [vocab, hidden_size], or with `shard` this
    rank's rows of it. The logits of two chunks exist at a time, the last state's and as many of the others as make up
    a chunk. Where they are rounded to bfloat16, that alone comes to about 3e-4 nats at logits of 8 to 16, and to four
    times as much at twice their size.
    """
    with torch.no_grad():
        count, tokens = states.shape[:2]
        high = torch.promote_types(states.dtype, torch.float32)
        divergences = torch.empty(count - 1, tokens, dtype=high, device=states.device)
        step = chunk_size(shard.vocab_size if shard is not None else weight.shape[0])
        together = max(1, step // max(tokens, 1))
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            last = states[-1, part] @ weight.t()
            for first in range(0, count - 1, together):
                group = slice(first, min(first + together, count - 1))
                parts = _own_part(last, states[group, part] @ weight.t(), softcap)
                found = parts[None] if shard is None else shard.exchange.gather_parts(parts)
                divergences[group, part] = _combined(found)
        return divergences


def _own_part(last: Tensor, others: Tensor, softcap: float) -> Tensor:
    """[5, states, tokens] of logits [tokens, rows] and [states, tokens, rows]: largest and sum of
    exp(logit - largest) of the last and of the others, and sum of exp(last - largest) (last - other)."""
    high = torch.promote_types(last.dtype, torch.float32)
    parts = torch.empty(5, *others.shape[:2], dtype=high, device=last.device)
    for start, stop in _blocks(last):
        rows = slice(start, stop)
        ours = softcap_(last[rows].to(high, copy=True), softcap)
        peak = ours.amax(-1)
        likely = (ours - peak[:, None]).exp_()
        total = likely.sum(-1)
        for index, other in enumerate(others[:, rows]):
            theirs = softcap_(other.to(high, copy=True), softcap)
            moment = torch.linalg.vecdot(likely, ours - theirs)
            other_peak = theirs.amax(-1)
            other_total = theirs.sub_(other_peak[:, None]).exp_().sum(-1)
            parts[:, index, rows] = torch.stack([peak, total, other_peak, other_total, moment])
    return parts


def _blocks(logits: Tensor) -> Iterator[tuple[int, int]]:
    """Ends of the blocks of tokens that are worked through one after the other. logits: [tokens, rows]."""
    tokens, rows = logits.shape
    step = row_blocks(logits).step if logits.device.type == "cpu" else max(1, _BLOCK_ELEMENTS // rows)
    yield from ((start, min(start + step, tokens)) for start in range(0, tokens, step))


def _combined(parts: Tensor) -> Tensor:
    """[states, tokens] from what every rank found in its rows, [ranks, 5, states, tokens]; rounding leaves none under
    0."""
    peak, total, other_peak, other_total, moment = parts.unbind(1)
    top, other_top = peak.amax(0), other_peak.amax(0)
    share = (peak - top).exp()
    whole = (total * share).sum(0)
    log_whole = whole.log() + top
    other_log_whole = (other_total * (other_peak - other_top).exp()).sum(0).log() + other_top
    return ((moment * share).sum(0) / whole - log_whole + other_log_whole).clamp(min=0)
