"""Activations of the MLP with lean backward passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv 2109.08668), elementwise."""
    return _ReluSquared.apply(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, eq. 6), elementwise."""
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, slope: float) -> Tensor:
    """g * sigmoid(slope * g) * (u + 1) with g = min(gate, limit), u = clamp(up, -limit, limit), elementwise; the
    experts of GPT-OSS (its model card, section 2.2). limit 0 clamps nothing."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(slope * gate) * (up + 1)


class _ReluSquared(torch.autograd.Function):
    """Keeps max(x, 0) only: its sign is the mask and itself the factor of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
