"""Attention against a softmax written out, one query at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_helpers import leaves, near

from megatron_adamba.ops.attention import attend, attention_mask, segment_positions

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [4, 5, 5, 5, 5, 5, 9]])


def one_by_one(q, k, v, start, window, documents, scale):
    """q: [batch, q, heads, d] are the positions from `start` on; k, v: [batch, k, kv_heads, d]."""
    batch, queries, heads, _ = q.shape
    shared = heads // k.shape[2]
    rows = []
    for b, i in itertools.product(range(batch), range(queries)):
        place = start + i
        seen = [
            j
            for j in range(place + 1)
            if (window is None or place - j < window) and (documents is None or documents[b, j] == documents[b, place])
        ]
        heads_out = []
        for h in range(heads):
            keys, values = k[b, seen, h // shared], v[b, seen, h // shared]
            heads_out.append((scale * keys @ q[b, i, h]).softmax(-1) @ values)
        rows.append(torch.cat(heads_out))
    return torch.stack(rows).view(batch, queries, -1)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 2, 3, 50])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
def test_forward_and_gradients(heads, window, documents):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, heads[0], 5, generator=generator).requires_grad_()
    k, v = (torch.randn(2, 7, heads[1], 5, generator=generator).requires_grad_() for _ in range(2))
    positions = segment_positions(7, 0, q.device)
    mask = attention_mask(positions, positions, window, documents)
    got = attend(q, k, v, mask, 0.7)
    doubles = leaves(q, k, v)
    want = one_by_one(*doubles, 0, window, documents, 0.7)
    near(got, want)
    cotangent = torch.randn(got.shape, generator=generator)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for tensor, double in zip((q, k, v), doubles, strict=True):
        near(tensor.grad, double.grad)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("new", [1, 3])
def test_later_queries_over_all_keys(new, window):
    """The shape of generation: the last positions ask, all keys so far answer."""
    q, k, v = torch.randn(2, new, 4, 6), torch.randn(2, 8, 2, 6), torch.randn(2, 8, 2, 6)
    start = 8 - new
    mask = attention_mask(segment_positions(new, start, q.device), segment_positions(8, 0, q.device), window, None)
    near(attend(q, k, v, mask, 0.4), one_by_one(*(t.double() for t in (q, k, v)), start, window, None, 0.4))


def test_the_mask_is_left_out_where_causality_says_it_all():
    positions = torch.arange(6)
    assert attention_mask(positions, positions, None, None) is None
    assert attention_mask(positions, positions, 2, None).shape == (1, 1, 6, 6)
    assert attention_mask(positions, positions, None, torch.zeros(3, 6)).shape == (3, 1, 6, 6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_zero_tokens_hand_zero_gradients_back(shape):
    q, k, v = (torch.zeros(*shape, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    out = attend(q, k, v, None, 0.5)
    assert out.shape == (*shape, 16)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (q, k, v))
    assert not torch.stack([t.grad.sum() for t in (q, k, v)]).any()


@pytest.mark.parametrize("seq", [5, 70])
@pytest.mark.parametrize("masked", [True, False])
def test_a_rank_without_heads_has_nothing_to_do(seq, masked):
    q, k, v = (torch.zeros(2, seq, 0, 4, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, seq, seq, dtype=torch.bool) if masked else None
    out = attend(q, k, v, mask, 0.5)
    assert out.shape == (2, seq, 0)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (q, k, v))


def test_a_window_of_one_sees_itself():
    q, k, v = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 2, 6)
    positions = torch.arange(5)
    near(attend(q, k, v, attention_mask(positions, positions, 1, None), 1.0), v.repeat_interleave(2, 2).flatten(2))


def test_one_token():
    q, k, v = torch.randn(1, 1, 4, 6), torch.randn(1, 1, 2, 6), torch.randn(1, 1, 2, 6)
    positions = torch.arange(1)
    near(attend(q, k, v, attention_mask(positions, positions, 3, None), 1.0), v.repeat_interleave(2, 2).flatten(2))
