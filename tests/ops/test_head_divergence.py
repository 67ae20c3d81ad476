"""How far predictions lie apart against torch's kl_div of whole distributions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import NewTensors

from megatron_adamba.ops.head_divergence import head_divergence

STATES, HIDDEN, VOCAB = 4, 6, 17


def inputs(tokens: int, scale: float = 1.0, vocab: int = VOCAB):
    generator = torch.Generator().manual_seed(tokens)
    states = scale * torch.randn(STATES, tokens, HIDDEN, generator=generator)
    return states, torch.randn(vocab, HIDDEN, generator=generator)


def whole(states, weight, softcap):
    logits = states.double() @ weight.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = F.log_softmax(logits, -1)
    last = log_p[-1:].expand_as(log_p[:-1])
    return F.kl_div(log_p[:-1], last, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("softcap", [0.0, 1.5, 15.0])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_is_that_of_whole_distributions(tokens, softcap):
    states, weight = inputs(tokens)
    found = head_divergence(states, weight, softcap)
    assert found.dtype == torch.float32 and found.shape == (STATES - 1, tokens)
    want = whole(states, weight, softcap)
    assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-6) and (want > 0.1).sum() >= min(tokens, 3)


@pytest.mark.parametrize("tokens", [300, 128])
def test_many_chunks_and_blocks(tokens):
    """More tokens than a chunk takes, a ragged one last, of a vocabulary of which a block holds few; then two states to
    a chunk, of three."""
    states, weight = inputs(tokens, vocab=1 << 16)
    found = head_divergence(states, weight, 8.0)
    assert torch.allclose(found.double(), whole(states, weight, 8.0), rtol=1e-4, atol=1e-5)


def test_small_differences_huge_logits_and_the_same_state():
    states, weight = inputs(11)
    states = states[-1] + 1e-2 * states
    states[0] = states[-1]
    found, want = head_divergence(states, weight), whole(states, weight, 0.0)
    assert not found[0].any() and want.max() < 0.01
    assert torch.allclose(found.double(), want, rtol=2e-2, atol=1e-6)
    assert head_divergence(1e4 * states, weight).isfinite().all()


def test_bfloat16_is_near():
    """Far apart, and close: there rounded logits add half the variance of what they differ by."""
    states, weight = inputs(11)
    for apart, tolerance in ((1.0, 0.01), (0.05, 1e-3)):
        rounded, matrix = (states[-1] + apart * (states - states[-1])).bfloat16(), weight.bfloat16()
        found = head_divergence(rounded, matrix, 5.0)
        assert found.dtype == torch.float32
        assert (found - whole(rounded, matrix, 5.0)).abs().max() < tolerance


def test_no_gradient_and_no_logits_of_all_states():
    states, weight = inputs(512, vocab=1 << 16)
    weight.requires_grad_()
    with NewTensors() as made:
        assert not head_divergence(states, weight).requires_grad
    # the logits of a chunk [256, 65536]
    assert made.largest == 256 << 16, made.shapes
