"""Elastic MLP: the first rows of the hidden layer."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.ops.activation import relu_squared, swiglu
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class NestedMLP(nn.Module):
    """down(relu(up x)^2), or down(silu(gate x) * up x)."""

    def __init__(self, config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> None:
        super().__init__()
        self.tp, self.granule = tp, config.ffn_granule
        self.gated = config.activation == "swiglu"
        names = ("gate", "up") if self.gated else ("up",)
        inner = self._owned_rows(config.ffn_size)
        self.up = NestedLinears(dict.fromkeys(names, inner), config.widths[-1], config.linear_bias, device)
        self.down = NestedLinears({"down": config.widths[-1]}, inner, config.linear_bias, device)

    def _owned_rows(self, rows: int) -> int:
        return self.tp.owned(rows // self.granule) * self.granule

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, w] normed, in the form of the residual stream; returns the same shape."""
        rows = self._owned_rows(row.ffn)
        if self.gated:
            gate, up = self.up(x, (rows, rows), context.accumulation, self.tp.exchange)
            inner = swiglu(gate, up)
        else:
            (up,) = self.up(x, (rows,), context.accumulation, self.tp.exchange)
            inner = relu_squared(up)
        (out,) = self.down(inner, (x.shape[-1],), context.accumulation, add_bias=self.tp.adds_bias)
        return self.tp.reduce_output(out)
