"""Tensor and sequence parallelism as the layers see it: who owns what, and how inputs and outputs meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.parallel.collectives import (
    JoinParts,
    Ready,
    ScatterOutput,
    Started,
    SumGradient,
    SumOutput,
    TakePart,
    gather_parts,
    start_gather_sequence,
    start_scatter_sum,
    start_sum,
)
from megatron_adamba.parallel.layout import owned_units
from megatron_adamba.parallel.topology import Topology


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every layer. Without arguments: one rank that has all of it, and no communication.

    A column-parallel map (its output rows shared out) takes `exchange`; a row-parallel one gives its partial sums to
    `reduce_output`. Between the two kinds lies the residual stream: whole on every rank, or, under sequence
    parallelism, each rank's part of the sequence, [batch, seq / size, channels].
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def owned(self, units: int) -> int:
        """How many of the first `units` units this rank owns."""
        return owned_units(units, self.size, self.rank)

    @property
    def exchange(self) -> TensorParallel | None:
        """What the kernels of column-parallel maps are given: None where there is nobody to meet."""
        return self if self.size > 1 else None

    @property
    def adds_bias(self) -> bool:
        """Whether this rank adds the bias of a row-parallel map, which must enter the sum once."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """x as a column-parallel map reads it. No gradient."""
        return self.start_gather(x).wait()

    def start_gather(self, x: Tensor) -> Ready | Started:
        if not self.sequence_parallel:
            return Ready(x)
        return start_gather_sequence(x, self.group, self.size)

    def start_reduce(self, grad: Tensor) -> Ready | Started:
        """Gradient of a column-parallel map's input, from this rank's part of the sum over rows."""
        if not self.sequence_parallel:
            return start_sum(grad, self.group)
        return start_scatter_sum(grad, self.group, self.size)

    def gather_parts(self, part: Tensor) -> Tensor:
        """[...] of every rank to [size, ...]. No gradient."""
        return gather_parts(part, self.group, self.size)

    def reduce_output(self, x: Tensor) -> Tensor:
        """Partial sums [batch, seq, channels] to the residual stream's form; x is used up."""
        if self.size == 1:
            return x
        if self.sequence_parallel:
            return ScatterOutput.apply(x, self.group, self.size)
        return SumOutput.apply(x, self.group)

    def reduce_shared(self, x: Tensor) -> Tensor:
        """Partial sums to the whole sum on every rank, where each rank goes on to use all of it for its own rows: the
        gradient is summed as well. x is used up."""
        if self.size == 1:
            return x
        return SumGradient.apply(SumOutput.apply(x, self.group), self.group)

    def sum_partial_gradient(self, x: Tensor) -> Tensor:
        """A replicated weight as it enters the residual stream: under sequence parallelism every rank sees its own
        tokens only, so the gradients are summed."""
        return SumGradient.apply(x, self.group) if self.size > 1 and self.sequence_parallel else x

    def share_tokens(self, x: Tensor, length: int) -> Tensor:
        """This rank's tokens of the residual stream, [tokens, channels], for layers that share out tokens instead of
        weights; what only lengthens the sequence beyond `length` is not among them. `join_tokens` goes back."""
        if self.size == 1:
            return x.flatten(0, 1)
        if self.sequence_parallel:
            return x[:, : self._own_length(x.shape[1], length)].flatten(0, 1)
        return TakePart.apply(x.flatten(0, 1), self.group, self.size, self.rank)

    def join_tokens(self, y: Tensor, like: Tensor, length: int) -> Tensor:
        """[tokens, channels] of this rank to the residual stream's form, that of `like`; zero for padding."""
        if self.size == 1:
            return y.view(like.shape)
        if self.sequence_parallel:
            own = self._own_length(like.shape[1], length)
            return F.pad(y.view(like.shape[0], own, like.shape[2]), (0, 0, 0, like.shape[1] - own))
        return JoinParts.apply(y, like.shape[0] * like.shape[1], self.group, self.size, self.rank).view(like.shape)

    def _own_length(self, part: int, length: int) -> int:
        return min(max(length - self.rank * part, 0), part)

    def sum_token_gradient(self, weight: Tensor) -> Tensor:
        """A replicated weight that every rank uses for its own tokens: the gradients are summed."""
        return SumGradient.apply(weight, self.group) if self.size > 1 else weight

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Sum of what every rank has of its own tokens; x is used up."""
        return SumOutput.apply(x, self.group) if self.size > 1 else x

    @overload
    def pad_sequence(self, x: Tensor, value: int) -> Tensor: ...

    @overload
    def pad_sequence(self, x: Tensor | None, value: int) -> Tensor | None: ...

    def pad_sequence(self, x: Tensor | None, value: int) -> Tensor | None:
        """[batch, seq] lengthened at its end to a multiple of the ranks that share out the sequence."""
        if x is None or not self.sequence_parallel or x.shape[1] % self.size == 0:
            return x
        return F.pad(x, (0, -x.shape[1] % self.size), value=value)


ALONE = TensorParallel()
"""one rank that has all of every layer"""


def tensor_parallel(topology: Topology) -> TensorParallel:
    """The tp group of a topology."""
    if topology.size("tp") == 1:
        return ALONE
    return TensorParallel(topology.size("tp"), topology.place("tp"), topology.group("tp"), topology.sequence_parallel)
