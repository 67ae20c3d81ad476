"""RMSNorm (arXiv 1910.07467, eq. 4) with a divisor of its own, so that it can be the norm of a prefix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor | None, norm_size: int, eps: float) -> Tensor:
    """scale * x / sqrt(sum(x^2) / norm_size + eps) over the last dimension.

    x: [..., w]; scale: [w], any float dtype, or None for ones; norm_size: the divisor, w in the usual norm.
    Statistics are computed in fp32 (float64 for float64 input); the result has x's dtype.
    """
    if x.is_cuda:
        # the library kernel divides by w: its eps and an outer factor make up for the difference
        w = x.shape[-1]
        y = F.rms_norm(x, (w,), None if scale is None else scale.to(x.dtype), eps * norm_size / w)
        return y if norm_size == w else y * math.sqrt(norm_size / w)
    if not torch.is_grad_enabled():
        return _scaled(x, scale, inverse_rms(x, norm_size, eps))
    return _RMSNorm.apply(x, scale, norm_size, eps)


def inverse_rms(x: Tensor, norm_size: int, eps: float) -> Tensor:
    """1 / sqrt(sum(x^2) / norm_size + eps), [..., 1], in fp32 or better, without a full-size temporary."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(norm_size).add_(eps).rsqrt_()


def _scaled(x: Tensor, scale: Tensor | None, r: Tensor) -> Tensor:
    y = x * r
    if scale is not None:
        y.mul_(scale)
    return y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; the library's CPU kernel for bf16 is some forty times slower."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor | None, norm_size: int, eps: float) -> Tensor:
        r = inverse_rms(x, norm_size, eps)
        ctx.save_for_backward(x, scale, r)
        ctx.norm_size = norm_size
        return _scaled(x, scale, r)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, r = ctx.saved_tensors
        x_hat = x * r
        grad_scale = None
        if scale is None:
            grad_hat = grad.to(x_hat.dtype)
        else:
            if ctx.needs_input_grad[1]:
                rows = (grad * x_hat).flatten(0, -2)
                grad_scale = rows.sum(0).to(scale.dtype)
            grad_hat = grad * scale.to(x_hat.dtype)
        # d r / d x = -r^3 x / norm_size
        projection = torch.linalg.vecdot(grad_hat, x_hat).unsqueeze(-1).div_(ctx.norm_size)
        grad_x = torch.addcmul(grad_hat, x_hat, projection, value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_scale, None, None
