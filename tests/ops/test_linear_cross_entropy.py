"""Head and loss in one against logits, softcap and cross entropy written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import NewTensors, leaves, near

from megatron_adamba.ops.linear_cross_entropy import IGNORED, linear_cross_entropy, softcap_, token_losses

TOKENS, HIDDEN, VOCAB = 11, 6, 17


def inputs(tokens: int = TOKENS, ignored: float = 0.3, scale: float = 2.0):
    generator = torch.Generator().manual_seed(tokens)
    hidden = (scale * torch.randn(tokens, HIDDEN, generator=generator)).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return hidden, weight, labels


def written_out(hidden, weight, labels, softcap):
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    picked = logits.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(labels == IGNORED, 0.0, torch.log(logits.exp().sum(-1)) - picked)


@pytest.mark.parametrize("softcap", [0.0, 1.5, 15.0])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_loss_and_gradients(chunk, softcap):
    hidden, weight, labels = inputs()
    hidden64, weight64 = leaves(hidden, weight)
    each = written_out(hidden64, weight64, labels, softcap)
    want = each.sum() / (labels != IGNORED).sum()
    got = linear_cross_entropy(hidden, weight, labels, softcap, chunk)
    assert got.dtype == torch.float32 and abs(got.item() - want.item()) <= 1e-5
    # whoever adds losses up or halves them scales the gradient
    (got * 0.37).backward()
    (want * 0.37).backward()
    near(hidden.grad, hidden64.grad)
    near(weight.grad, weight64.grad)
    assert not hidden.grad[labels == IGNORED].any()
    losses = token_losses(hidden, weight, labels, softcap, chunk)
    assert losses.shape == labels.shape and not losses.requires_grad
    assert (losses - each).abs().max() <= 1e-5 and not losses[labels == IGNORED].any()
    with torch.no_grad():
        assert abs(linear_cross_entropy(hidden, weight, labels, softcap, chunk).item() - want.item()) <= 1e-5


def test_gradcheck():
    hidden, weight = (t.detach().double().requires_grad_() for t in inputs(5)[:2])
    labels = torch.tensor([3, IGNORED, 0, 16, 3])
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 3.0, 2), (hidden, weight))


@pytest.mark.parametrize(("tokens", "ignored"), [(TOKENS, 2.0), (0, 0.0), (1, 2.0)])
def test_nothing_to_score(tokens, ignored):
    hidden, weight, labels = inputs(tokens, ignored)
    assert (labels == IGNORED).all()
    loss = linear_cross_entropy(hidden, weight, labels, 2.0, 3)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).item() == 0


def test_the_same_matrix_at_both_ends():
    """The embedding's gradient and the head's are added in one tensor, also when the head is used twice."""
    _, weight, labels = inputs()
    tokens = torch.arange(TOKENS) % VOCAB
    (weight64,) = leaves(weight)
    loss = sum(linear_cross_entropy(F.embedding(tokens, weight) * s, weight, labels, 4.0, 5) for s in (1.0, -0.5))
    want = sum(
        written_out(weight64[tokens] * s, weight64, labels, 4.0).sum() / (labels != IGNORED).sum() for s in (1.0, -0.5)
    )
    loss.backward()
    want.backward()
    assert abs(loss.item() - want.item()) <= 1e-5
    near(weight.grad, weight64.grad)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_does_not_train_gets_no_gradient(frozen):
    hidden, weight, labels = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    both = inputs()
    linear_cross_entropy(*both, 2.0, 4).backward()
    linear_cross_entropy(hidden, weight, labels, 2.0, 4).backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")
    trained, want = (weight, both[1]) if frozen == "hidden" else (hidden, both[0])
    near(trained.grad, want.grad)


def test_huge_logits_stay_finite():
    hidden, weight, labels = inputs(scale=1e4)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bfloat16_sums_the_weights_gradient_over_chunks_in_float32():
    hidden, weight, labels = inputs(300, ignored=0.1)
    half = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    same = leaves(*half)
    loss = linear_cross_entropy(*half, labels, 5.0, 3)
    want = written_out(*same, labels, 5.0).sum() / (labels != IGNORED).sum()
    loss.backward()
    want.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - want.item()) < 0.02
    assert half[1].grad.dtype == torch.bfloat16
    near(half[0].grad, same[0].grad, 0.02)
    near(half[1].grad, same[1].grad, 0.02)


def test_logits_of_all_tokens_never_exist_at_once():
    tokens, hidden_size, vocab, chunk = 96, 8, 64, 8
    hidden, weight = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(vocab, hidden_size)
    weight.requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    with NewTensors() as made:
        linear_cross_entropy(hidden, weight, labels, 15.0, chunk).backward()
    # the gradients of hidden [96, 8] and weight [64, 8], and logits of one chunk [8, 64]
    assert made.largest == tokens * hidden_size < tokens * vocab, made.shapes
    assert sum(shape == (chunk, vocab) for shape in made.shapes) > 0
    with NewTensors() as made, torch.no_grad():
        token_losses(hidden, weight, labels, 15.0, chunk)
    assert made.largest <= chunk * vocab


def test_the_softcap_bends_in_place():
    logits = torch.tensor([-100.0, -1.0, 0.0, 2.0, 100.0])
    want = 15 * torch.tanh(logits / 15)
    assert softcap_(logits, 15.0) is logits
    near(logits, want)
    assert torch.equal(softcap_(want.clone(), 0.0), want)
