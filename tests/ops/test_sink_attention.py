"""Attention with sinks against the softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_marks import NEEDS_CUDA

from megatron_adamba.ops.attention import attend, attention_mask, segment_positions


def written_out(q, k, v, sinks, mask, scale):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = scores.masked_fill(~allowed, -torch.inf)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])


def inputs(seq: int, heads: int, kv_heads: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
    return [make(2, seq, heads, 8), make(2, seq, kv_heads, 8), make(2, seq, kv_heads, 8), make(heads)]


def masks(seq: int, device: str) -> dict[str, torch.Tensor | None]:
    positions = segment_positions(seq, 0, torch.device(device))
    documents = (torch.arange(seq, device=device) >= seq // 3).int().expand(2, seq)
    return {
        "causal": None,
        "window": attention_mask(positions, positions, 3, None),
        "documents": attention_mask(positions, positions, None, documents),
    }


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("seq", [1, 13, 70])
@DEVICES
def test_output_and_gradients(name, heads, kv_heads, seq, device):
    mask = masks(seq, device)[name]
    ours = inputs(seq, heads, kv_heads, device=device)
    exact = [t.detach().double().requires_grad_() for t in ours]
    out = attend(*ours[:3], mask, 0.4, ours[3])
    want = written_out(*exact, mask, 0.4)
    assert (out - want).abs().max() <= 1e-5
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for mine, theirs in zip(ours, exact):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * max(theirs.grad.abs().max().item(), 1)


def test_a_sink_of_minus_infinity_is_plain_attention():
    q, k, v, _ = inputs(13, 4, 2)
    assert (attend(q, k, v, None, 0.3, torch.full((4,), -1e4)) - attend(q, k, v, None, 0.3)).abs().max() <= 1e-5


@DEVICES
@pytest.mark.parametrize("name", ["causal", "window"])
def test_bf16_is_close(name, device):
    rough = inputs(43, 4, 2, torch.bfloat16, device)
    mask = masks(43, device)[name]
    exact = [t.detach().double() for t in rough]
    assert (attend(*rough[:3], mask, 0.3, rough[3]) - written_out(*exact, mask, 0.3)).abs().max() < 0.03


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 5, 0)])
def test_no_tokens_and_no_heads_have_zero_gradients(shape):
    batch, seq, heads = shape
    q, k, v = (torch.zeros(batch, seq, heads, 8, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(heads, requires_grad=True)
    attend(q, k, v, None, 0.3, sinks).sum().backward()
    assert sinks.grad is not None and not sinks.grad.any()
