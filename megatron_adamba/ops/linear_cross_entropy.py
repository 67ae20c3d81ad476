"""Head and cross entropy in one: logits exist for one chunk of tokens at a time, in forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""label of a position that is not scored"""


def softcap_(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in place; the cap of Gemma 2 (arXiv 2408.00118) and nanochat. 0 leaves them."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float = 0.0, chunk_tokens: int = 1024
) -> Tensor:
    """Mean cross entropy in nats over the scored positions, a scalar in fp32 (float64 for float64 input).

    hidden: [tokens, hidden_size]; weight: [vocab, hidden_size]; labels: [tokens], IGNORED where unscored. With no
    scored position the loss is zero and so are its gradients. The backward pass of each chunk runs right behind its
    forward pass, while its logits are at hand; only gradients of the size of `hidden` and `weight` stay.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, softcap, chunk_tokens)
    total = token_losses(hidden, weight, labels, softcap, chunk_tokens).sum()
    return total / (labels != IGNORED).sum().clamp(min=1)


def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float = 0.0, chunk_tokens: int = 1024
) -> Tensor:
    """Cross entropy of each position, [tokens], zero where the label is IGNORED. No gradient."""
    with torch.no_grad():
        parts = [
            _chunk_losses(hidden[i : i + chunk_tokens], weight, labels[i : i + chunk_tokens], softcap)[0]
            for i in range(0, hidden.shape[0], chunk_tokens)
        ]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=dtype)


def _chunk_losses(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float):
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    softcap_(logits, softcap)
    log_sum = torch.logsumexp(logits, dim=-1)
    scored = labels != IGNORED
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (log_sum - target) * scored, logits, log_sum, scored


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, chunk_tokens: int) -> Tensor:
        high = torch.promote_types(hidden.dtype, torch.float32)
        count = (labels != IGNORED).sum().clamp(min=1)
        total = hidden.new_zeros((), dtype=high)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=high, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            losses, logits, log_sum, scored = _chunk_losses(hidden[part], weight, labels[part], softcap)
            total += losses.sum()
            grad_logits = _grad_logits(logits, log_sum, labels[part], scored, softcap).div_(count).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _grad_logits(logits: Tensor, log_sum: Tensor, labels: Tensor, scored: Tensor, softcap: float) -> Tensor:
    """softmax - one-hot, through the softcap's slope 1 - (capped / c)^2; zero rows where nothing is scored."""
    slope = 1 - (logits / softcap).square() if softcap else None
    grad = logits.sub_(log_sum.unsqueeze(-1)).exp_()
    grad.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), grad.new_full((labels.shape[0], 1), -1.0))
    grad.mul_(scored.unsqueeze(-1))
    return grad.mul_(slope) if slope is not None else grad


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logits^T hidden, summed in total's dtype."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
    else:
        total.add_(grad_logits.t() @ hidden)
