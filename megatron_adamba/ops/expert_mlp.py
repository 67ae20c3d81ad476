"""The experts of a mixture, each on its own tokens, by a leading slice of its weights; gradients are added in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_adamba.ops.expert_call import (
    DOWN,
    DOWN_BIAS,
    GATE,
    GATE_BIAS,
    UP,
    UP_BIAS,
    ExpertCall,
    ExpertGradients,
    activation,
    activation_and_slopes,
)
from megatron_adamba.ops.grouped_experts import GroupedExperts, grouped_served
from megatron_adamba.ops.nested_linear import Accumulation, GradientSink


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    counts: Tensor,
    rows: int,
    limit: float,
    slope: float,
    sinks: Sequence[GradientSink],
    accumulation: Accumulation,
) -> Tensor:
    """y = weight * (down(clamped_swiglu(gate x, up x)) + bias), every row of x by its own expert.

    x: [n, cols], rows sorted by expert; weights: [n], the routing weight of each row; parameters: gate and up
    [experts, >= rows, >= cols], down [experts, >= cols, >= rows], then the biases of the three, [experts, ...];
    counts: [experts] int64, rows of x for each expert; a loop over the experts brings them to the host, the grouped
    kernels of CUDA devices do not. Returns [n, cols] in x's dtype. An expert without rows has a zero gradient.
    """
    parameters = tuple(parameters)
    trained = tuple(parameter.requires_grad for parameter in parameters)
    if accumulation is Accumulation.DEFER:
        parameters = tuple(parameter.detach() for parameter in parameters)
    anchor = x.new_empty(0).requires_grad_() if any(trained) and torch.is_grad_enabled() else None
    call = ExpertCall(counts, rows, x.shape[1], limit, slope, accumulation, tuple(sinks), trained)
    experts = GroupedExperts if grouped_served(x, parameters, rows) else LoopedExperts
    return experts.apply(x, weights, anchor, call, *parameters)


class LoopedExperts(torch.autograd.Function):
    """Keeps x and what comes out of gate and up; the activation is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weights, anchor, call: ExpertCall, *parameters):
        gate = x.new_empty(x.shape[0], call.rows)
        up = torch.empty_like(gate)
        y = torch.empty_like(x)
        for expert, part in _parts(call):
            if part.start == part.stop:
                continue
            own = _Slices(parameters, expert, call)
            torch.addmm(own.gate_bias, x[part], own.gate.t(), out=gate[part])
            torch.addmm(own.up_bias, x[part], own.up.t(), out=up[part])
            inner = activation(gate[part], up[part], call)
            torch.addmm(own.down_bias, inner, own.down.t(), out=y[part])
        y.mul_(weights.unsqueeze(1))
        ctx.save_for_backward(x, weights, gate, up, *parameters)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weights, gate, up, *parameters = ctx.saved_tensors
        call = ctx.call
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        high = torch.promote_types(x.dtype, torch.float32)
        grad_weights = torch.zeros(weights.shape, dtype=high, device=x.device)
        sums = ExpertGradients(call, parameters)
        for expert, part in _parts(call):
            if part.start == part.stop:
                sums.clear(expert)
                continue
            own = _Slices(parameters, expert, call)
            inner, slope_gate, slope_up = activation_and_slopes(gate[part], up[part], call)
            plain = grad[part] @ own.down
            by_bias = grad[part] @ own.down_bias
            grad_weights[part] = torch.linalg.vecdot(plain.to(high), inner.to(high)) + by_bias.to(high)
            scaled = grad[part] * weights[part].unsqueeze(1)
            sums.add_product(DOWN, expert, scaled, inner)
            sums.add_sum(DOWN_BIAS, expert, scaled)
            plain.mul_(weights[part].unsqueeze(1))
            grad_gate, grad_up = slope_gate.mul_(plain), slope_up.mul_(plain)
            sums.add_product(GATE, expert, grad_gate, x[part])
            sums.add_sum(GATE_BIAS, expert, grad_gate)
            sums.add_product(UP, expert, grad_up, x[part])
            sums.add_sum(UP_BIAS, expert, grad_up)
            if grad_x is not None:
                torch.mm(grad_gate, own.gate, out=grad_x[part]).addmm_(grad_up, own.up)
        return grad_x, grad_weights.to(weights.dtype), None, None, *sums.results()


def _parts(call: ExpertCall):
    """(expert, its rows, maybe none) of every expert."""
    start = 0
    for expert, count in enumerate(call.counts.tolist()):
        yield expert, slice(start, start + count)
        start += count


class _Slices:
    """What one expert uses of its weights: gate and up [rows, cols], down [cols, rows], biases."""

    def __init__(self, parameters: Sequence[Tensor], expert: int, call: ExpertCall) -> None:
        rows, cols = call.rows, call.cols
        self.gate = parameters[GATE][expert, :rows, :cols]
        self.up = parameters[UP][expert, :rows, :cols]
        self.down = parameters[DOWN][expert, :cols, :rows]
        self.gate_bias = parameters[GATE_BIAS][expert, :rows]
        self.up_bias = parameters[UP_BIAS][expert, :rows]
        self.down_bias = parameters[DOWN_BIAS][expert, :cols]
