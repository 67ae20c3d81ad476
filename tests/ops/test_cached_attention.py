"""One query a sequence over a cache, against a softmax by loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_adamba.ops.cached_attention import cached_attention

SCALE = 0.3


def by_loops(q, k, v, used, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """All in float64; q: [sequences, heads, head_dim], k, v: [kv_heads, sequences, places, head_dim]."""
    q, k, v = q.double(), k.double(), v.double()
    sequences, heads, head_dim = q.shape
    out = torch.zeros(sequences, heads, head_dim, dtype=torch.float64)
    for s in range(sequences):
        for h in range(heads):
            kv = h // (heads // k.shape[0])
            seen = [place for place in range(used) if mask is None or _sees(mask, s, h, place)]
            scores = torch.stack([SCALE * (q[s, h] @ k[kv, s, place]) for place in seen])
            weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[h].double().exp()))
            out[s, h] = sum(w * v[kv, s, place] for w, place in zip(weights, seen))
    return out.flatten(1)


def _sees(mask: Tensor, sequence: int, head: int, place: int) -> bool:
    return bool(mask[sequence % mask.shape[0], head % mask.shape[1], 0, place])


def random_cache(
    kv_heads: int, places: int, dtype: torch.dtype, sequences: int = 3, group: int = 2, head_dim: int = 16
):
    generator = torch.Generator().manual_seed(kv_heads * 100 + places)
    shape = (kv_heads, sequences, places, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return torch.randn(sequences, kv_heads * group, head_dim, generator=generator).to(dtype), k, v


def masks(kind: str, sequences: int, heads: int, used: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (sequences, heads if kind == "heads" else 1, 1, used)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["none", "sequences", "heads"])
@pytest.mark.parametrize(("kv_heads", "places", "used"), [(1, 1, 1), (2, 9, 5), (4, 70, 70), (3, 130, 67)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_softmax_by_loops(dtype, kv_heads, places, used, kind, sinks):
    q, k, v = random_cache(kv_heads, places, dtype)
    mask = masks(kind, q.shape[0], q.shape[1], used)
    sink = torch.linspace(-1, 2, q.shape[1]).to(dtype) if sinks else None
    out = cached_attention(q, k, v, used, mask, SCALE, sink)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        out.double(), by_loops(q, k, v, used, mask, sink), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def test_scores_are_not_rounded_to_bfloat16():
    """Scores of about 700, of which bfloat16 keeps steps of 4: keys that differ by less share their weight rightly."""
    q = torch.full((1, 1, 64), 3.3125, dtype=torch.bfloat16)
    k = torch.full((1, 1, 2, 64), 3.3125, dtype=torch.bfloat16)
    k[0, 0, 1, 0] = 3.0
    v = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1).expand(1, 1, 2, 64)
    out = cached_attention(q, k, v, 2, None, 1.0)
    expected = torch.sigmoid(torch.tensor(-3.3125 * 0.3125, dtype=torch.float64))
    torch.testing.assert_close(out[0].double(), expected.expand(64), rtol=0.01, atol=0)


def test_no_query_no_result():
    q, k, v = random_cache(2, 4, torch.bfloat16)
    assert cached_attention(q[:0], k[:, :0], v[:, :0], 4, None, SCALE).shape == (0, 64)
