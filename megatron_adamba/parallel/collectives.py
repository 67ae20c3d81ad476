"""Collectives of a tensor-parallel group, plain and with gradients. Empty tensors are not sent; all ranks see them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames both; the old names still serve where only they exist
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ready:
    """A tensor that nothing has to be waited for."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def wait(self) -> Tensor:
        return self.value


class Started:
    """A collective in flight; `finish` turns its buffer into the result."""

    def __init__(self, work: dist.Work, buffer: Tensor, finish: Callable[[Tensor], Tensor], *keep: Tensor) -> None:
        self.work, self.buffer, self.finish = work, buffer, finish
        self.keep = keep
        """inputs that have to live as long as the collective runs"""

    def wait(self) -> Tensor:
        self.work.wait()
        return self.finish(self.buffer)


def start_sum(x: Tensor, group: dist.ProcessGroup | None) -> Ready | Started:
    """Sum over the group, in x's own memory."""
    if x.numel() == 0:
        return Ready(x)
    x = x.contiguous()
    return Started(dist.all_reduce(x, group=group, async_op=True), x, lambda buffer: buffer)


def start_gather_sequence(x: Tensor, group: dist.ProcessGroup | None, size: int) -> Ready | Started:
    """[batch, seq / size, ...] of every rank to [batch, seq, ...]."""
    batch, part, *rest = x.shape
    if x.numel() == 0:
        return Ready(x.new_empty(batch, part * size, *rest))
    x = x.contiguous()
    buffer = x.new_empty(size * batch, part, *rest)
    work = _all_gather(buffer, x, group=group, async_op=True)
    arrange = lambda parts: parts.view(size, batch, part, *rest).transpose(0, 1).reshape(batch, size * part, *rest)
    return Started(work, buffer, arrange, x)


def start_scatter_sum(x: Tensor, group: dist.ProcessGroup | None, size: int) -> Ready | Started:
    """[batch, seq, ...] of every rank, summed, and of the sum this rank's [batch, seq / size, ...]."""
    batch, seq, *rest = x.shape
    if x.numel() == 0:
        return Ready(x.new_empty(batch, seq // size, *rest))
    parts = x.view(batch, size, seq // size, *rest).transpose(0, 1).contiguous()
    buffer = x.new_empty(batch, seq // size, *rest)
    work = _reduce_scatter(buffer, parts.view(size * batch, seq // size, *rest), group=group, async_op=True)
    return Started(work, buffer, lambda result: result, parts)


def gather_parts(part: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """[...] of every rank to [size, ...]. No gradient."""
    if part.numel() == 0:
        return part.new_empty(size, *part.shape)
    buffer = part.new_empty(size, *part.shape)
    _all_gather(buffer.view(-1), part.contiguous().view(-1), group=group)
    return buffer


class SumOutput(torch.autograd.Function):
    """Forward: sum over the group, in x's memory; backward: nothing, as every rank's output has the whole gradient.

    x is not marked as changed: it may be what another function returned as a view, which autograd would then refuse.
    Nobody may have kept it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return start_sum(x.detach(), group).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class ScatterOutput(torch.autograd.Function):
    """Forward: sum over the group and keep this rank's part of the sequence; backward: gather the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return start_scatter_sum(x.contiguous(), group, size).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_gather_sequence(grad, ctx.group, ctx.size).wait(), None, None


class SumGradient(torch.autograd.Function):
    """Forward: nothing; backward: sum over the group."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_sum(grad.clone(), ctx.group).wait(), None


def part_range(count: int, size: int, rank: int) -> tuple[int, int]:
    """First and one past the last of `count` rows of rank `rank`; ranks differ by one row at most."""
    return rank * count // size, (rank + 1) * count // size


def _join_parts(x: Tensor, count: int, group: dist.ProcessGroup | None, size: int, rank: int) -> Tensor:
    """This rank's rows [own, ...] of `count` to all of them."""
    if count == 0:
        return x
    largest = -(-count // size)
    padded = x.new_zeros(largest, *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = gather_parts(padded, group, size)
    bounds = (part_range(count, size, r) for r in range(size))
    return torch.cat([part[: end - first] for part, (first, end) in zip(parts, bounds)])


class TakePart(torch.autograd.Function):
    """Forward: this rank's rows of what every rank has; backward: everybody's rows of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None, size: int, rank: int) -> Tensor:
        ctx.call = (x.shape[0], group, size, rank)
        first, end = part_range(x.shape[0], size, rank)
        return x[first:end].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _join_parts(grad, *ctx.call), None, None, None


class JoinParts(torch.autograd.Function):
    """Forward: everybody's rows; backward: this rank's rows of the gradient, which every rank has whole."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int, group: dist.ProcessGroup | None, size: int, rank: int) -> Tensor:
        ctx.range = part_range(count, size, rank)
        return _join_parts(x, count, group, size, rank)

    @staticmethod
    def backward(ctx, grad: Tensor):
        first, end = ctx.range
        return grad[first:end], None, None, None, None
