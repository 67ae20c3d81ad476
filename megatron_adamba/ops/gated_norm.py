"""Gates of Mamba: y = x * silu(z), and Mamba-2's rms_norm(x * silu(z)) * weight over groups of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adamba.ops.blocks import accumulation_dtype, sequence_blocks


def _normalised(x: Tensor, z: Tensor, group_size: int, eps: float, acc: torch.dtype):
    """x * silu(z) over its groups' root mean square, and 1 / that: [..., groups, size] and [..., groups, 1]."""
    gated = F.silu(z.to(acc)).mul_(x)
    gated = gated.view(*gated.shape[:-1], gated.shape[-1] // group_size, group_size)
    rstd = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
    return gated.mul_(rstd), rstd


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, group_size, eps):
        acc = accumulation_dtype(x.dtype)
        scale = weight.to(acc)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in sequence_blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            unit, _ = _normalised(x[:, rows], z[:, rows], group_size, eps, acc)
            y[:, rows] = unit.flatten(-2).mul_(scale)
        ctx.save_for_backward(x, z, weight)
        ctx.group_size, ctx.eps = group_size, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, weight = ctx.saved_tensors
        acc = accumulation_dtype(x.dtype)
        scale = weight.to(acc)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        d_weight = torch.zeros_like(scale)
        for rows in sequence_blocks(x.shape[1], x.shape[0] * x.shape[2], x.device):
            unit, rstd = _normalised(x[:, rows], z[:, rows], ctx.group_size, ctx.eps, acc)
            dy_block = dy[:, rows].to(acc)
            d_weight += (dy_block * unit.flatten(-2)).sum(dim=(0, 1))
            d_unit = (dy_block * scale).view(unit.shape)
            # d(gated) = rstd * (d_unit - unit * mean(d_unit * unit))
            along = (d_unit * unit).mean(dim=-1, keepdim=True)
            d_gated = d_unit.addcmul_(unit, along, value=-1).mul_(rstd).flatten(-2)
            gate = z[:, rows].to(acc)
            dz[:, rows] = torch.ops.aten.silu_backward(d_gated * x[:, rows], gate)
            dx[:, rows] = F.silu(gate).mul_(d_gated)
        return dx, dz, d_weight.to(weight.dtype), None, None


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """weight * g / sqrt(mean(g^2) + eps) with g = x * silu(z) (arXiv 2405.21060, section 7.1, after GroupNorm).

    x and z [batch, seq, d_inner], any strides; weight [d_inner]; the mean is over each run of `group_size` channels.
    Computes in float32 (float64 for float64) and returns [batch, seq, d_inner] in x's dtype. Keeps only its inputs.
    Raises ValueError where shapes do not fit.
    """
    if x.dim() != 3 or x.shape != z.shape or weight.shape != x.shape[2:]:
        raise ValueError(
            f"gated_rms_norm needs x and z [batch, seq, d_inner] and weight [d_inner], "
            f"not {tuple(x.shape)}, {tuple(z.shape)} and {tuple(weight.shape)}"
        )
    if group_size < 1 or x.shape[2] % group_size:
        raise ValueError(f"group_size must divide d_inner {x.shape[2]}, not be {group_size}")
    return _GatedRMSNorm.apply(x, z, weight, group_size, eps)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z):
        acc = accumulation_dtype(x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in sequence_blocks(x.shape[1], x[:, :1].numel(), x.device):
            y[:, rows] = F.silu(z[:, rows].to(acc)).mul_(x[:, rows])
        ctx.save_for_backward(x, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        acc = accumulation_dtype(x.dtype)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        for rows in sequence_blocks(x.shape[1], x[:, :1].numel(), x.device):
            gate, dy_block = z[:, rows].to(acc), dy[:, rows].to(acc)
            dx[:, rows] = F.silu(gate).mul_(dy_block)
            dz[:, rows] = torch.ops.aten.silu_backward(dy_block * x[:, rows], gate)
        return dx, dz


def silu_gate(x: Tensor, z: Tensor) -> Tensor:
    """x * silu(z) for x and z [batch, seq, ...] of one shape, in float32 inside, in x's dtype outside.

    Keeps only its inputs for backward, not silu(z). Raises ValueError where the shapes differ.
    """
    if x.shape != z.shape:
        raise ValueError(f"x and z must have one shape, not {tuple(x.shape)} and {tuple(z.shape)}")
    return _SiluGate.apply(x, z)
