"""Head and cross entropy in one: logits exist for one chunk of tokens at a time, in forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""label of a position that is not scored"""

_CHUNK_ELEMENTS = 1 << 24
_BLOCK_ELEMENTS = 1 << 19
"""logits that a CPU works on at a time: two fp32 copies fit its caches"""


def softcap_(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in place; the cap of Gemma 2 (arXiv 2408.00118) and nanochat. 0 leaves them."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def capped_copy(logits: Tensor, cap: float) -> tuple[Tensor, Tensor | None]:
    """Softcapped logits in fp32 or better, a copy, and tanh(logits / cap), which their slope needs, where there is a
    cap."""
    high = torch.promote_types(logits.dtype, torch.float32)
    if not cap:
        return logits.to(high, copy=True), None
    bounded = (logits.to(high) / cap).tanh_()
    return bounded * cap, bounded


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float = 0.0,
    chunk_tokens: int | None = None,
    losses_out: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy in nats over the scored positions, a scalar in fp32 (float64 for float64 input).

    hidden: [tokens, hidden_size]; weight: [vocab, hidden_size]; labels: [tokens], IGNORED where unscored. With no
    scored position the loss is zero and so are its gradients. The backward pass of each chunk runs right behind its
    forward pass, while its logits are at hand; only gradients of the size of `hidden` and `weight` stay.
    chunk_tokens: positions of one chunk; None takes what keeps its logits to 16M numbers. losses_out: [tokens], filled
    with each position's loss.
    """
    chunk_tokens = chunk_tokens or chunk_size(weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, softcap, chunk_tokens, losses_out)
    losses = token_losses(hidden, weight, labels, softcap, chunk_tokens)
    if losses_out is not None:
        losses_out.copy_(losses)
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float = 0.0, chunk_tokens: int | None = None
) -> Tensor:
    """Cross entropy of each position, [tokens], zero where the label is IGNORED. No gradient."""
    chunk_tokens = chunk_tokens or chunk_size(weight.shape[0])
    with torch.no_grad():
        parts = [
            _chunk_losses(hidden[i : i + chunk_tokens], weight, labels[i : i + chunk_tokens], softcap)[0]
            for i in range(0, hidden.shape[0], chunk_tokens)
        ]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=dtype)


def chunk_size(vocab_size: int) -> int:
    """Tokens of one chunk: as few chunks as memory allows, but none so short that its matmul is slow."""
    return min(max(_CHUNK_ELEMENTS // vocab_size, 256), 4096)


def row_blocks(logits: Tensor) -> range:
    """Starts of the blocks of rows that are worked through one after the other; on a CPU they stay in its cache.

    logits: [tokens, vocab].
    """
    tokens, vocab = logits.shape
    rows = tokens if logits.device.type != "cpu" else max(1, _BLOCK_ELEMENTS // vocab)
    return range(0, tokens, max(rows, 1))


def _chunk_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, grad_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [tokens] in fp32 or better, and the logits' buffer [tokens, vocab] in hidden's dtype.

    With `grad_scale`, a scalar, the buffer then holds grad_scale * d sum(losses) / d logits.
    """
    logits = hidden @ weight.t()
    losses = torch.empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    blocks = row_blocks(logits)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        losses[rows] = _block_losses(logits[rows], labels[rows], softcap, grad_scale)
    return losses, logits


def _block_losses(logits: Tensor, labels: Tensor, softcap: float, grad_scale: Tensor | None) -> Tensor:
    """Losses of a block of rows; its logits [rows, vocab] are used up or, with `grad_scale`, become their gradient."""
    index, scored = labels.clamp(min=0).unsqueeze(-1), (labels != IGNORED).unsqueeze(-1)
    bounded = logits.to(torch.promote_types(logits.dtype, torch.float32))
    capped = bounded
    if softcap:
        bounded = bounded.div_(softcap).tanh_()
        capped = bounded * softcap
    target = capped.gather(-1, index)
    peak = capped.amax(-1, keepdim=True)
    exponential = capped.sub_(peak).exp_()
    total = exponential.sum(-1, keepdim=True)
    losses = ((total.log() + peak - target) * scored).squeeze(-1)
    if grad_scale is not None:
        # softmax - one-hot, through the softcap's slope 1 - tanh^2; zero rows where nothing is scored
        weight = scored * grad_scale
        grad = exponential.mul_(weight / total).scatter_add_(-1, index, -weight)
        if softcap:
            grad.addcmul_(grad * bounded, bounded, value=-1)
        logits.copy_(grad)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap: float, chunk_tokens: int, losses_out: Tensor | None) -> Tensor:
        high = torch.promote_types(hidden.dtype, torch.float32)
        grad_scale = (labels != IGNORED).sum().clamp(min=1).to(high).reciprocal()
        total = hidden.new_zeros((), dtype=high)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = WeightGradient(weight, hidden.shape[0] <= chunk_tokens) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            losses, grad_logits = _chunk_losses(hidden[part], weight, labels[part], softcap, grad_scale)
            total += losses.sum()
            if losses_out is not None:
                losses_out[part] = losses
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add(grad_logits, hidden[part])
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.result())
        ctx.weight_dtype = weight.dtype
        return total * grad_scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class WeightGradient:
    """Sum over chunks of grad_logits^T hidden, in fp32 or better where there is more than one."""

    def __init__(self, weight: Tensor, single: bool) -> None:
        self.weight, self.single = weight, single
        self.sum: Tensor | None = None

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """grad_logits: [tokens, vocab]; hidden: [tokens, hidden_size]."""
        if self.sum is None:
            product = grad_logits.t() @ hidden
            self.sum = product if self.single else product.to(torch.promote_types(product.dtype, torch.float32))
        elif self.sum.dtype == hidden.dtype:
            self.sum.addmm_(grad_logits.t(), hidden)
        else:
            self.sum.add_(grad_logits.t() @ hidden)

    def result(self) -> Tensor:
        """[vocab, hidden_size]; zeros where there was no chunk."""
        return torch.zeros_like(self.weight) if self.sum is None else self.sum
