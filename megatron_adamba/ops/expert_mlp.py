"""The experts of a mixture, each on its own tokens, by a leading slice of its weights; gradients are added in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

_SMALLEST_STEP = 16
"""rows: the smallest difference between padded sizes"""


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
    """Keeps x and what comes out of gate and up; the activation is computed again in backward.

    Where products are padded (`_Part`), a product writes beyond its expert's rows, and the next expert, coming later,
    writes over that; buffers have room for the last one's.
    """

    @staticmethod
    def forward(ctx, x, weights, anchor, call: ExpertCall, *parameters):
        parts = _parts(call, x)
        room = max((part.padded.stop for part in parts), default=0)
        gate = x.new_empty(room, call.rows)
        up, y = torch.empty_like(gate), x.new_empty(room, call.cols)
        for part in parts:
            own, rows, out = _Slices(parameters, part.expert, call), part.of(x), part.padded
            torch.addmm(own.gate_bias, rows, own.gate.t(), out=gate[out])
            torch.addmm(own.up_bias, rows, own.up.t(), out=up[out])
            inner = activation(gate[out], up[out], call)
            torch.addmm(own.down_bias, inner, own.down.t(), out=y[out])
        y = y[: x.shape[0]]
        y.mul_(weights.unsqueeze(1))
        ctx.save_for_backward(x, weights, gate, up, *parameters)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weights, gate, up, *parameters = ctx.saved_tensors
        call = ctx.call
        grad_x = x.new_empty(gate.shape[0], call.cols) if ctx.needs_input_grad[0] else None
        grad_weights = torch.empty_like(weights)
        sums, weights = ExpertGradients(call, parameters), weights.unsqueeze(1)
        parts = _parts(call, x)
        for expert in set(range(call.counts.numel())) - {part.expert for part in parts}:
            sums.clear(expert)
        for part in parts:
            own, rows = _Slices(parameters, part.expert, call), part.rows
            inner, slope_gate, slope_up = activation_and_slopes(gate[part.padded], up[part.padded], call)
            plain = part.of(grad) @ own.down
            grad_weights[rows] = part.dot(plain, inner) + grad[rows] @ own.down_bias
            scaled = part.scale(grad[rows], weights[rows])
            sums.add_product(DOWN, part.expert, scaled, inner)
            sums.add_sum(DOWN_BIAS, part.expert, scaled)
            inner_grad = part.scale(plain[: part.count], weights[rows], plain)
            grad_gate, grad_up = slope_gate.mul_(inner_grad), slope_up.mul_(inner_grad)
            sums.add_product(GATE, part.expert, grad_gate, part.of(x))
            sums.add_sum(GATE_BIAS, part.expert, grad_gate)
            sums.add_product(UP, part.expert, grad_up, part.of(x))
            sums.add_sum(UP_BIAS, part.expert, grad_up)
            if grad_x is not None:
                torch.mm(grad_gate, own.gate, out=grad_x[part.padded]).add_(grad_up @ own.up)
        grad_x = None if grad_x is None else grad_x[: x.shape[0]]
        return grad_x, grad_weights, None, None, *sums.results()


@dataclass(frozen=True)
class _Part:
    """An expert and its rows, of which there is at least one.

    The bf16 products of a CPU are compiled for their very sizes, and as few hundred of them are kept, experts whose
    counts change with every batch would have theirs compiled again and again: a half of a small layer's time. So there
    the number of rows is rounded up to one of eight sizes per octave. Rows beyond an expert's own belong to the next
    experts or are zero, and what they add to gradients is multiplied by zero.
    """

    expert: int
    rows: slice
    padded: slice

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, x: Tensor) -> Tensor:
        """[padded rows, ...] of x [n, ...]."""
        if self.padded.stop <= x.shape[0]:
            return x[self.padded]
        rows = x.new_zeros(self.padded.stop - self.padded.start, *x.shape[1:])
        rows[: self.count] = x[self.rows]
        return rows

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """[count] products of rows of the expert's own, summed up in at least fp32."""
        high = torch.promote_types(left.dtype, torch.float32)
        return (left[: self.count] * right[: self.count]).sum(1, dtype=high)

    def scale(self, x: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """x [count, ...] times factors [count, 1], then zeros: [padded rows, ...]."""
        if out is None:
            out = x.new_empty(self.padded.stop - self.padded.start, x.shape[1])
        torch.mul(x, factors, out=out[: self.count])
        out[self.count :].zero_()
        return out


def _parts(call: ExpertCall, x: Tensor) -> list[_Part]:
    """The experts that have rows."""
    pad = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    parts, start = [], 0
    for expert, count in enumerate(call.counts.tolist()):
        if count:
            step = max(_SMALLEST_STEP, 1 << max((count - 1).bit_length() - 4, 0)) if pad else 1
            padded = -(-count // step) * step
            parts.append(_Part(expert, slice(start, start + count), slice(start, start + padded)))
        start += count
    return parts


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
