"""Rotary position embedding (arXiv 2104.09864), half-split, together with the weightless norm of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.config.rope import yarn_range
from megatron_adamba.ops.rms_norm import inverse_rms


@dataclass(frozen=True)
class Yarn:
    """Frequencies for contexts `factor` times longer than the one they were made for (arXiv 2309.00071, section 3)."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Those with more than beta_fast turns in the original context stay, those with fewer than beta_slow are
        divided by the factor, those between are blended linearly in their index; the bounds are not rounded."""
        count = plain.shape[0]
        low, high = yarn_range(2 * count, theta, self.original_context, self.beta_fast, self.beta_slow)
        index = torch.arange(count, dtype=plain.dtype, device=plain.device)
        ramp = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    @property
    def concentration(self) -> float:
        """Factor on queries and on keys: attention scores grow by its square."""
        return 0.1 * math.log(self.factor) + 1


def rotary_table(
    positions: Tensor, head_dim: int | Sequence[int], theta: float, sign: int, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), each [seq, head_dim / 2] in fp32; yarn changes the frequencies.

    positions: [seq]; head_dim: or its steps, ascending: what a step adds has the frequencies of a head of its size;
    sign: 1 rotates by +angle, -1 by -angle. YaRN's concentration is not in it.
    """
    steps = [head_dim] if isinstance(head_dim, int) else head_dim
    sizes = [after - before for before, after in zip([0, *steps], steps)]
    frequencies = torch.cat([_frequencies(size, theta, yarn, positions.device) for size in sizes])
    angle = torch.outer(positions.float(), frequencies)
    return angle.cos(), angle.sin() * sign


def _frequencies(head_dim: int, theta: float, yarn: Yarn | None, device: torch.device) -> Tensor:
    index = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    plain = theta ** (-index / head_dim)
    return plain if yarn is None else yarn.frequencies(plain, theta)


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, norm_size: int | None, eps: float) -> Tensor:
    """Rotate the halves of each head and, unless `norm_size` is None, divide by sqrt(sum(x^2) / norm_size + eps).

    x: [batch, seq, heads, head_dim]; cos, sin: [seq, head_dim / 2]. Rotation keeps lengths, so norm after rotation
    and norm before it are the same function.
    """
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in (cos, sin))
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin, norm_size, eps)[0]
    return _RotateNorm.apply(x, cos, sin, norm_size, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, norm_size: int | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Also what the norm multiplied by, [batch, seq, heads, 1]; cos, sin: [seq, 1, head_dim / 2]."""
    out = _rotate(x, cos, sin)
    if norm_size is None:
        return out, None
    r = inverse_rms(x, norm_size, eps)
    return out.mul_(r.to(out.dtype)), r


class _RotateNorm(torch.autograd.Function):
    """Keeps its output (which attention keeps anyway) and one number a head."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, norm_size: int | None, eps: float) -> Tensor:
        out, r = _rotated(x, cos, sin, norm_size, eps)
        ctx.save_for_backward(out if r is not None else None, r, cos, sin)
        ctx.norm_size = norm_size
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, r, cos, sin = ctx.saved_tensors
        if out is not None:
            # the norm's backward in rotated coordinates: the rotation is orthogonal and commutes with it
            projection = torch.linalg.vecdot(grad, out).unsqueeze(-1) / ctx.norm_size
            grad = torch.addcmul(grad, out, projection, value=-1).mul_(r.to(grad.dtype))
        return _rotate(grad, cos, -sin), None, None, None, None
