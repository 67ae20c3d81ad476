"""What the routers of one forward pass tell the rest: losses that balance them, and how full each expert was."""

from __future__ import annotations

import torch
from torch import Tensor


class RouterStatistics:
    """Filled by the MoE layers of one forward pass; made for it, and read after it."""

    def __init__(self) -> None:
        self.losses: dict[int, Tensor] = {}
        """by block: weighted auxiliary losses, scalars with a gradient"""
        self.loads: dict[int, Tensor] = {}
        """by block: choices that each expert got, [experts], int64"""

    def record(self, block: int, loss: Tensor | None, counts: Tensor) -> None:
        """Again for a block that is recomputed: the first loss stays, as it is what backward starts from."""
        self.loads[block] = counts.detach()
        if loss is not None:
            self.losses.setdefault(block, loss)

    def total(self) -> Tensor | float:
        """Sum of the auxiliary losses; 0 where there are none."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else 0.0


def balance_loss(probabilities: Tensor, load: Tensor, tokens: Tensor) -> Tensor:
    """experts * sum_e f_e P_e: 1 when balanced (arXiv 2101.03961, eqs. 4 to 6, over the k choices of every token).

    probabilities: [experts], sums over all tokens of the softmax of all logits; load: [experts], choices that each got;
    tokens: their number, a scalar. f_e is the share of the choices, P_e the mean probability. Zero tokens give 0.
    """
    share = load / load.sum().clamp(min=1)
    return load.numel() * (share * probabilities).sum() / tokens.clamp(min=1)


def router_z_loss(squares: Tensor, tokens: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (arXiv 2202.08906, eq. 5). squares: their sum, a scalar."""
    return squares / tokens.clamp(min=1)
