"""Tokens to experts and back: sorted by expert, every token as often as it has experts, none lost."""

from __future__ import annotations

import torch
from torch import Tensor


class Dispatch:
    """The order of one batch of choices.

    choices: [tokens, k] expert of each choice. `order` [tokens * k] lists the choices by expert, those of one expert in
    their own order; `counts` [experts] is how many each has.
    """

    def __init__(self, choices: Tensor, num_experts: int) -> None:
        flat = choices.flatten()
        self.k = choices.shape[1]
        self.order = flat.argsort(stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(flat.numel(), device=flat.device)
        self.counts = torch.bincount(flat, minlength=num_experts)

    def spread(self, x: Tensor) -> Tensor:
        """[tokens, channels] to [tokens * k, channels], by expert."""
        return _Spread.apply(x, self.order, self.place, self.k)

    def collect(self, y: Tensor) -> Tensor:
        """[tokens * k, channels], by expert, to the sum of each token's rows, [tokens, channels]."""
        return _Collect.apply(y, self.order, self.place, self.k)

    def sort(self, values: Tensor) -> Tensor:
        """[tokens, k] to [tokens * k], by expert."""
        return values.flatten()[self.order]


def _rows(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.index_select(0, order.div(k, rounding_mode="floor"))


def _sums(y: Tensor, place: Tensor, k: int) -> Tensor:
    """By a gather and a sum over k, which rounds once; adding row by row would round k times, in any order."""
    return y.index_select(0, place).view(place.numel() // k, k, y.shape[-1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return _rows(x, order, k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _sums(grad, ctx.saved_tensors[0], ctx.k), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _sums(y, place, k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _rows(grad, ctx.saved_tensors[0], ctx.k), None, None, None
