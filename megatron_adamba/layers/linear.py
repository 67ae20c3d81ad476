"""Nested linear layers: one module holds the weights that read the same input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_adamba.ops.cpu_linear import linear
from megatron_adamba.ops.nested_linear import Accumulation, GradientSink, nested_linears
from megatron_adamba.parallel.tensor import TensorParallel


class NestedLinears(nn.Module):
    """Several linear maps of one input, each used by a leading block of rows and columns.

    Parameters: `{name}_weight` [rows, cols] and, with bias, `{name}_bias` [rows] for each name.
    """

    def __init__(self, rows: dict[str, int], cols: int, bias: bool, device=None) -> None:
        super().__init__()
        self.names = tuple(rows)
        self.has_bias = bias
        for name, size in rows.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(size, cols, device=device)))
        if bias:
            for name, size in rows.items():
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(size, device=device)))
        self.sinks = tuple(GradientSink() for _ in range(len(rows) * (2 if bias else 1)))

    def forward(
        self,
        x: Tensor,
        rows: Sequence[int],
        accumulation: Accumulation,
        exchange: TensorParallel | None = None,
        add_bias: bool = True,
    ) -> tuple[Tensor, ...]:
        """x: [..., cols used]; rows: how many of each map's rows; returns [..., rows[i]] each. The last two are those
        of `nested_linears`."""
        weights = [getattr(self, f"{name}_weight") for name in self.names]
        biases = [getattr(self, f"{name}_bias") for name in self.names] if self.has_bias else None
        return nested_linears(x, weights, biases, rows, x.shape[-1], self.sinks, accumulation, exchange, add_bias)

    def some(self, x: Tensor, rows: dict[str, int]) -> tuple[Tensor, ...]:
        """Only the maps named in rows, in that order, where nothing learns. x: [..., cols used]."""
        weights = [getattr(self, f"{name}_weight") for name in rows]
        biases = [getattr(self, f"{name}_bias") for name in rows] if self.has_bias else None
        return nested_linears(x, weights, biases, tuple(rows.values()), x.shape[-1], (), Accumulation.DIRECT)


class Projection(nn.Module):
    """A static linear map without bias: `weight` [rows, cols], left as allocated until it is filled from outside."""

    def __init__(self, cols: int, rows: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols, device=device, dtype=dtype))

    def forward(self, x: Tensor, exchange: TensorParallel | None = None) -> Tensor:
        """x: [..., cols] to [..., rows]; exchange: where other ranks hold further rows."""
        if exchange is None:
            return linear(x, self.weight)
        rows, cols = self.weight.shape
        (y,) = nested_linears(x, [self.weight], None, (rows,), cols, (), Accumulation.DIRECT, exchange)
        return y

    def some(self, x: Tensor, rows: slice) -> Tensor:
        """Only some of the rows, where nothing learns. x: [..., cols]."""
        return linear(x, self.weight[rows])
