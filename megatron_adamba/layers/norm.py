"""RMSNorm of a prefix of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_adamba.ops.rms_norm import rms_norm
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class NestedNorm(nn.Module):
    """u = gain[w] * weight[:w] * x / sqrt(sum(x^2) / norm_size[w] + eps) for x of w channels.

    Parameters: `weight` [last width] (absent without `has_weight`) and `gain` [n_widths]. With one width it is the
    norm of a static layer.
    """

    def __init__(
        self,
        widths: Sequence[int],
        norm_sizes: Sequence[int],
        eps: float,
        has_weight: bool,
        tp: TensorParallel = ALONE,
        device=None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.rows = {width: (index, size) for index, (width, size) in enumerate(zip(widths, norm_sizes))}
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(widths[-1], device=device)) if has_weight else None
        self.gain = nn.Parameter(torch.empty(len(widths), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., w] with w one of the widths; returns the same shape and dtype."""
        width = x.shape[-1]
        index, norm_size = self.rows[width]
        high = torch.promote_types(self.gain.dtype, torch.float32)
        scale = self.gain[index].to(high)
        if self.weight is not None:
            scale = self.weight[:width].to(high) * scale
        if x.numel():
            # of no tokens the gradient is zero on every rank
            scale = self.tp.sum_partial_gradient(scale)
        return rms_norm(x, scale.expand(width), norm_size, self.eps)
