"""Cross entropy and distillation in one against torch's kl_div and cross_entropy of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import NewTensors, leaves, near

from megatron_adamba.ops.linear_cross_entropy import IGNORED, linear_cross_entropy
from megatron_adamba.ops.linear_distillation import DistillationLoss, Teacher, linear_distillation

BATCH, SEQ, HIDDEN, THEIRS, VOCAB = 2, 7, 6, 5, 17
LOSSES = [
    DistillationLoss(0.0),
    DistillationLoss(1.0),
    DistillationLoss(0.3, 2.0),
    DistillationLoss(0.6, 0.7, reverse=True),
    DistillationLoss(1.0, 3.0, reverse=True),
]


def inputs(ignored: float = 0.3, scale: float = 2.0, seq: int = SEQ):
    """hidden, weight, labels, the teacher's hidden and weight; the teacher has a hidden size of its own."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    hidden, weight = (scale * draw(BATCH, seq, HIDDEN)).requires_grad_(), draw(VOCAB, HIDDEN).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, seq), generator=generator)
    labels[torch.rand(BATCH, seq, generator=generator) < ignored] = IGNORED
    return hidden, weight, labels, scale * draw(BATCH, seq, THEIRS), draw(VOCAB, THEIRS)


def capped(hidden, weight, softcap):
    logits = hidden @ weight.T
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def written_out(hidden, weight, labels, teacher, matrix, loss, softcap, their_softcap):
    """Each scored position's loss and divergence."""
    ours, theirs = capped(hidden, weight, softcap), capped(teacher.double(), matrix.double(), their_softcap)
    entropies = F.cross_entropy(ours.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    log_p, log_q = (F.log_softmax(logits / loss.temperature, -1) for logits in (ours, theirs))
    pair = (log_q, log_p) if loss.reverse else (log_p, log_q)
    divergences = F.kl_div(*pair, reduction="none", log_target=True).sum(-1) * (labels != IGNORED)
    each = (1 - loss.share) * entropies.view(labels.shape) + loss.share * loss.temperature**2 * divergences
    return each, divergences


@pytest.mark.parametrize("softcaps", [(0.0, 0.0), (1.5, 15.0), (15.0, 0.0)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_and_gradients(loss, chunk, softcaps):
    hidden, weight, labels, theirs, matrix = inputs()
    hidden64, weight64 = leaves(hidden, weight)
    each, divergences = written_out(hidden64, weight64, labels, theirs, matrix, loss, *softcaps)
    want = each.sum() / (labels != IGNORED).sum()
    entropies, found = (torch.full(labels.shape, float("nan")) for _ in range(2))
    teacher = Teacher(theirs, matrix, softcaps[1])
    got = linear_distillation(hidden, weight, labels, teacher, loss, softcaps[0], None, chunk, entropies, found)
    assert got.dtype == torch.float32 and abs(got.item() - want.item()) <= 1e-5 * max(1, want.item())
    (got * 0.37).backward()
    (want * 0.37).backward()
    near(hidden.grad, hidden64.grad)
    near(weight.grad, weight64.grad)
    assert not hidden.grad[labels == IGNORED].any()
    assert torch.allclose(found.double(), divergences, rtol=1e-4, atol=1e-5) and not found[labels == IGNORED].any()
    plain = written_out(hidden64, weight64, labels, theirs, matrix, DistillationLoss(0.0), *softcaps)[0]
    assert torch.allclose(entropies.double(), plain, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        again = linear_distillation(hidden, weight, labels, teacher, loss, softcaps[0])
        assert abs(again.item() - want.item()) <= 1e-5 * max(1, want.item()) and not again.requires_grad


@pytest.mark.parametrize("loss", [DistillationLoss(0.4, 1.7), DistillationLoss(0.4, 1.7, reverse=True)], ids=str)
def test_gradcheck(loss):
    hidden, weight, labels, theirs, matrix = (t.detach() for t in inputs())
    teacher = Teacher(theirs.double(), matrix.double(), 2.0)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    call = lambda h, w: linear_distillation(h, w, labels, teacher, loss, 3.0, None, 4)
    assert torch.autograd.gradcheck(call, (hidden, weight))


def test_without_a_share_it_is_the_cross_entropy():
    hidden, weight, labels, theirs, matrix = inputs()
    plain = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), 2.0)
    got = linear_distillation(hidden, weight, labels, Teacher(theirs, matrix), DistillationLoss(0.0), 2.0)
    assert abs(got.item() - plain.item()) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_who_agrees_with_the_teacher_learns_nothing_more(reverse):
    """The same states and head: the divergence and its gradient are zero, up to rounding."""
    hidden, weight, labels, _, _ = inputs()
    loss = DistillationLoss(1.0, 1.3, reverse)
    got = linear_distillation(hidden, weight, labels, Teacher(hidden, weight), loss)
    got.backward()
    assert got.item() < 1e-5 and hidden.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize(("seq", "ignored"), [(0, 0.0), (3, 2.0)])
def test_nothing_to_score(seq, ignored):
    hidden, weight, labels, theirs, matrix = inputs(ignored, seq=seq)
    loss = linear_distillation(hidden, weight, labels, Teacher(theirs, matrix), DistillationLoss(0.5), 2.0)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_huge_logits_stay_finite():
    hidden, weight, labels, theirs, matrix = inputs(scale=1e4)
    for reverse in (False, True):
        loss = linear_distillation(hidden, weight, labels, Teacher(theirs, matrix), DistillationLoss(0.5, 1, reverse))
        loss.backward()
        assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_only_what_trains_gets_a_gradient():
    hidden, weight, labels, theirs, matrix = inputs()
    theirs.requires_grad_()
    matrix.requires_grad_()
    weight.requires_grad_(False)
    linear_distillation(hidden, weight, labels, Teacher(theirs, matrix), DistillationLoss(0.5)).backward()
    assert hidden.grad is not None and weight.grad is None and theirs.grad is None and matrix.grad is None


def test_logits_of_all_tokens_never_exist_at_once():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 512, 8, generator=generator).requires_grad_()
    weight = torch.randn(1 << 16, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 1 << 16, (1, 512), generator=generator)
    with NewTensors() as made:
        linear_distillation(hidden, weight, labels, Teacher(hidden.detach(), weight), DistillationLoss(0.5)).backward()
    assert made.largest == 256 << 16, made.shapes
