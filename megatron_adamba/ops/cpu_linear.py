"""A linear layer that in float32 on a CPU runs through oneDNN, as PyTorch's own does in bfloat16.

PyTorch hands float32 matmuls to MKL, which on CPUs that are not Intel's leaves half their speed unused; oneDNN, which
PyTorch also carries, does not. The arithmetic is float32 either way. The operator is one that PyTorch's compiler emits
and no public function reaches, so it is probed for; where it is missing, `torch.nn.functional.linear` serves.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def _onednn_linear():
    """The operator (input [rows, k] contiguous, weight [n, k], bias) -> [rows, n], or None."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        ones = torch.ones(2, 2)
        works = torch.equal(operator(ones, ones, None, "none", [], ""), ones @ ones)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if works else None


def _served(x: Tensor, weight: Tensor) -> bool:
    return product_served(x, weight) and weight.is_contiguous()


def product_served(rows: Tensor, weight: Tensor) -> bool:
    """Whether `product` is to be preferred; rows: [..., k], weight: [n, k]. Small products are over before it pays."""
    if rows.device.type != "cpu" or not rows.dtype == weight.dtype == torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or rows.numel() * weight.shape[0] < 1 << 24:
        return False
    return torch.backends.mkldnn.is_available() and _onednn_linear() is not None


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [m, k] times the transpose of weight [n, k], plus bias [n], for what `product_served`. No gradient.

    Strided operands cost the operator a hundred times its time, so they are copied: rows that are not contiguous, and
    weights that are neither contiguous nor the transpose of something contiguous.
    """
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _onednn_linear()(rows.contiguous(), weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = d_weight = d_bias = None
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        if needs_x:
            dx = product(dy, weight.t()).view(x.shape)
        if needs_weight:
            # The narrower of the two is the one worth transposing.
            if rows.shape[1] <= dy.shape[1]:
                d_weight = product(rows.t(), dy.t()).t().contiguous()
            else:
                d_weight = product(dy.t(), rows.t())
        if ctx.has_bias and needs_bias:
            d_bias = dy.sum(dim=0)
        return dx, d_weight, d_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in_features], weight [out_features, in_features], bias [out_features] -> [..., out_features].

    `torch.nn.functional.linear` for every device, dtype and size; large float32 products on a CPU take oneDNN, where
    it is differentiable once.
    """
    if _served(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
