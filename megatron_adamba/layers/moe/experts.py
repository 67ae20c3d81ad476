"""The experts' weights, all experts of one rank in one tensor each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.ops.expert_mlp import expert_mlp
from megatron_adamba.ops.nested_linear import Accumulation, GradientSink


class Experts(nn.Module):
    """Clamped SwiGLU MLPs with biases.

    Parameters: gate_weight, up_weight [experts, expert_ffn_size, width], down_weight [experts, width,
    expert_ffn_size], gate_bias, up_bias [experts, expert_ffn_size], down_bias [experts, width].
    """

    gate_weight: nn.Parameter
    up_weight: nn.Parameter
    down_weight: nn.Parameter
    gate_bias: nn.Parameter
    up_bias: nn.Parameter
    down_bias: nn.Parameter
    NAMES = ("gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias")

    def __init__(self, config: ResolvedModel, count: int, device=None) -> None:
        """count: experts of this rank."""
        super().__init__()
        self.limit, self.slope = config.expert_gate_limit, config.expert_gate_slope
        rows, width = config.expert_ffn_size, config.widths[-1]
        shapes = ((rows, width), (rows, width), (width, rows), (rows,), (rows,), (width,))
        for name, shape in zip(self.NAMES, shapes):
            self.register_parameter(name, nn.Parameter(torch.empty(count, *shape, device=device)))
        self.sinks = tuple(GradientSink() for _ in self.NAMES)

    def forward(self, x: Tensor, weights: Tensor, counts: Tensor, rows: int, accumulation: Accumulation) -> Tensor:
        """See `expert_mlp`. x: [n, w] sorted by expert; weights: [n]; counts: [experts], rows of x of each."""
        parameters = [getattr(self, name) for name in self.NAMES]
        return expert_mlp(x, weights, parameters, counts, rows, self.limit, self.slope, self.sinks, accumulation)
