"""Causal attention in blocks of queries against the library's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_adamba.ops.attention import attend
from megatron_adamba.ops.causal_attention import QUERY_BLOCK, causal_attention


def both(seq: int, heads: int, kv_heads: int, dtype: torch.dtype, reference: torch.dtype):
    """(output, dq, dk, dv) of the blocks in `dtype` and of the library in `reference`."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(2, seq, n, 8) for n in (heads, kv_heads, kv_heads)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(2, seq, heads * 8, generator=generator, dtype=torch.float64).to(dtype)
    inputs = [value.clone().requires_grad_() for value in values]
    out = causal_attention(*inputs, 0.3)
    got = (out, *torch.autograd.grad(out, inputs, grad))
    inputs = [value.to(reference).requires_grad_() for value in values]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(2)
    return got, (out, *torch.autograd.grad(out, inputs, grad.to(reference)))


@pytest.mark.parametrize("seq", [1, 7, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 31])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_the_librarys(seq, heads, kv_heads, dtype, bound):
    got, want = both(seq, heads, kv_heads, dtype, torch.float64)
    for name, mine, theirs in zip(("output", "dq", "dk", "dv"), got, want):
        assert mine.dtype == dtype
        # a query that sees one key alone has a gradient of zero, up to rounding
        scale = max(theirs.abs().max().item(), 1.0)
        assert (mine - theirs).abs().max() <= bound * scale, name


def test_a_key_ahead_is_not_seen_even_where_it_is_not_finite():
    q, k, v = (torch.randn(1, 200, 2, 8) for _ in range(3))
    before = attend(q, k, v, None, 0.3)
    k[:, 150:] = 1e30
    after = attend(q, k, v, None, 0.3)
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])
