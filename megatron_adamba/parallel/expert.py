"""Expert parallelism as the layers see it: rows travel to the ranks that hold their experts, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_adamba.parallel.layout import contiguous_rows
from megatron_adamba.parallel.topology import Topology


@dataclass(frozen=True)
class ExpertParallel:
    """The ranks that share out the experts of every layer, in runs. Without arguments: one rank that has them all."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def owned(self, num_experts: int) -> int:
        """Experts of this rank."""
        first, end = contiguous_rows(num_experts, 1, self.size, self.rank)
        return end - first

    def send(self, counts: Tensor) -> Journey:
        """Plan the way of rows sorted by expert. counts: [experts], rows of this rank for each expert."""
        return Journey(self, counts)


class Journey:
    """The way of one batch of rows to their experts' ranks and back; the host learns all counts at once, or none where
    no row travels."""

    def __init__(self, ep: ExpertParallel, counts: Tensor) -> None:
        self.ep = ep
        if ep.size == 1:
            self.counts = counts
            return
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=ep.group)
        # the one place where the host has to know how full the experts are
        sent, got = torch.stack([counts, received]).tolist()
        experts = len(sent) // ep.size
        by_source = [got[r * experts : (r + 1) * experts] for r in range(ep.size)]
        self.sizes_out = [sum(sent[r * experts : (r + 1) * experts]) for r in range(ep.size)]
        self.sizes_in = [sum(row) for row in by_source]
        self.counts = received.view(ep.size, experts).sum(0)
        """[experts of this rank] int64: rows of each from all ranks"""
        self.order = _by_expert(by_source).to(counts.device)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(self.order.numel(), device=counts.device)

    def arrive(self, x: Tensor) -> Tensor:
        """[rows sent, ...] to [rows received, ...], sorted by this rank's experts."""
        if self.ep.size == 1:
            return x
        return _Reorder.apply(self._exchange(x, self.sizes_in, self.sizes_out), self.order, self.place)

    def come_back(self, y: Tensor) -> Tensor:
        """[rows received, ...] to [rows sent, ...], as they were sent."""
        if self.ep.size == 1:
            return y
        return self._exchange(_Reorder.apply(y, self.place, self.order), self.sizes_out, self.sizes_in)

    def _exchange(self, x: Tensor, into: Sequence[int], out_of: Sequence[int]) -> Tensor:
        return _AllToAll.apply(x, tuple(into), tuple(out_of), self.ep.group)


def _by_expert(by_source: Sequence[Sequence[int]]) -> Tensor:
    """Rows come by source, of each source by expert; their numbers by expert, of each expert by source."""
    starts: list[list[int]] = []
    start = 0
    for row in by_source:
        starts.append([])
        for count in row:
            starts[-1].append(start)
            start += count
    pieces = [
        torch.arange(starts[source][expert], starts[source][expert] + by_source[source][expert])
        for expert in range(len(by_source[0]))
        for source in range(len(by_source))
    ]
    return torch.cat(pieces)


class _AllToAll(torch.autograd.Function):
    """Rows by destination to rows by source; backward goes the other way. Ranks with nothing take part."""

    @staticmethod
    def forward(ctx, x: Tensor, into: tuple[int, ...], out_of: tuple[int, ...], group) -> Tensor:
        ctx.into, ctx.out_of, ctx.group = into, out_of, group
        return _all_to_all(x, into, out_of, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, ctx.out_of, ctx.into, ctx.group), None, None, None


def _all_to_all(x: Tensor, into: tuple[int, ...], out_of: tuple[int, ...], group) -> Tensor:
    result = x.new_empty(sum(into), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), list(into), list(out_of), group=group)
    return result


class _Reorder(torch.autograd.Function):
    """x[order], whose backward is a gather by the inverse permutation."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


ALL_EXPERTS = ExpertParallel()
"""one rank that has every expert"""


def expert_parallel(topology: Topology) -> ExpertParallel:
    """The ep group of a topology."""
    if topology.size("ep") == 1:
        return ALL_EXPERTS
    return ExpertParallel(topology.size("ep"), topology.place("ep"), topology.group("ep"))
