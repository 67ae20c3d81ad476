"""Elastic MLP: the first rows of the hidden layer."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.ops.activation import relu_squared, swiglu


class NestedMLP(nn.Module):
    """down(relu(up x)^2), or down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, device=None) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        names = ("gate", "up") if self.gated else ("up",)
        self.up = NestedLinears(dict.fromkeys(names, config.ffn_size), config.hidden_size, config.linear_bias, device)
        self.down = NestedLinears({"down": config.hidden_size}, config.ffn_size, config.linear_bias, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, w] normed; returns [batch, seq, w]."""
        if self.gated:
            gate, up = self.up(x, (row.ffn, row.ffn), context.accumulation)
            inner = swiglu(gate, up)
        else:
            (up,) = self.up(x, (row.ffn,), context.accumulation)
            inner = relu_squared(up)
        (out,) = self.down(inner, (x.shape[-1],), context.accumulation)
        return out
