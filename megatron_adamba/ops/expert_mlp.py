"""The experts of a mixture, each on its own tokens, by a leading slice of its weights; gradients are added in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.ops.nested_linear import Accumulation, GradientSink

GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = range(6)


@dataclass(frozen=True)
class ExpertCall:
    """The parts of a call that are not tensors."""

    counts: tuple[int, ...]
    """tokens of each expert, which lie one expert after the other"""
    rows: int
    """leading rows of every expert"""
    cols: int
    """leading channels that experts read and write"""
    limit: float
    slope: float
    """those of `activation.clamped_swiglu`"""
    accumulation: Accumulation
    sinks: tuple[GradientSink, ...]
    trained: tuple[bool, ...]


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    counts: Sequence[int],
    rows: int,
    limit: float,
    slope: float,
    sinks: Sequence[GradientSink],
    accumulation: Accumulation,
) -> Tensor:
    """y = weight * (down(clamped_swiglu(gate x, up x)) + bias), every row of x by its own expert.

    x: [n, cols], rows sorted by expert; weights: [n], the routing weight of each row; parameters: gate and up
    [experts, >= rows, >= cols], down [experts, >= cols, >= rows], then the biases of the three, [experts, ...];
    counts: rows of x for each expert. Returns [n, cols] in x's dtype. An expert without rows has a zero gradient.
    """
    parameters = tuple(parameters)
    trained = tuple(parameter.requires_grad for parameter in parameters)
    if accumulation is Accumulation.DEFER:
        parameters = tuple(parameter.detach() for parameter in parameters)
    anchor = x.new_empty(0).requires_grad_() if any(trained) and torch.is_grad_enabled() else None
    call = ExpertCall(tuple(counts), rows, x.shape[1], limit, slope, accumulation, tuple(sinks), trained)
    return _ExpertMLP.apply(x, weights, anchor, call, *parameters)


class _ExpertMLP(torch.autograd.Function):
    """Keeps x and what comes out of gate and up; the activation is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weights, anchor, call: ExpertCall, *parameters):
        gate = x.new_empty(x.shape[0], call.rows)
        up = torch.empty_like(gate)
        y = torch.empty_like(x)
        for expert, part in _parts(call):
            own = _Slices(parameters, expert, call)
            torch.addmm(own.gate_bias, x[part], own.gate.t(), out=gate[part])
            torch.addmm(own.up_bias, x[part], own.up.t(), out=up[part])
            inner = _activation(gate[part], up[part], call)
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
        sums = _ParameterGradients(call, parameters)
        for expert, part in _parts(call):
            own = _Slices(parameters, expert, call)
            inner, slope_gate, slope_up = _activation_and_slopes(gate[part], up[part], call)
            plain = grad[part] @ own.down
            grad_weights[part] = torch.linalg.vecdot(plain.to(high), inner.to(high)) + (grad[part] @ own.down_bias).to(
                high
            )
            scaled = grad[part] * weights[part].unsqueeze(1)
            sums.add(DOWN, expert, scaled, inner)
            sums.add_bias(DOWN_BIAS, expert, scaled)
            plain.mul_(weights[part].unsqueeze(1))
            grad_gate, grad_up = slope_gate.mul_(plain), slope_up.mul_(plain)
            sums.add(GATE, expert, grad_gate, x[part])
            sums.add_bias(GATE_BIAS, expert, grad_gate)
            sums.add(UP, expert, grad_up, x[part])
            sums.add_bias(UP_BIAS, expert, grad_up)
            if grad_x is not None:
                torch.mm(grad_gate, own.gate, out=grad_x[part]).addmm_(grad_up, own.up)
        return grad_x, grad_weights.to(weights.dtype), None, None, *sums.results()


def _parts(call: ExpertCall):
    """(expert, its rows) of every expert that has any."""
    start = 0
    for expert, count in enumerate(call.counts):
        if count:
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


def _activation(gate: Tensor, up: Tensor, call: ExpertCall) -> Tensor:
    if call.limit:
        gate, up = gate.clamp(max=call.limit), up.clamp(-call.limit, call.limit)
    return (gate * call.slope).sigmoid_().mul_(gate).mul_(up + 1)


def _activation_and_slopes(gate: Tensor, up: Tensor, call: ExpertCall) -> tuple[Tensor, Tensor, Tensor]:
    """The activation and its derivatives by gate and up; zero where a clamp holds."""
    bounded, bounded_up = gate, up
    if call.limit:
        bounded, bounded_up = gate.clamp(max=call.limit), up.clamp(-call.limit, call.limit)
    sigmoid = (bounded * call.slope).sigmoid_()
    slope_up = sigmoid * bounded
    shifted = bounded_up + 1
    inner = slope_up * shifted
    # d(g s) = s + slope g s (1 - s), with s = sigmoid(slope g)
    slope_gate = torch.addcmul(sigmoid, slope_up, 1 - sigmoid, value=call.slope).mul_(shifted)
    if call.limit:
        slope_gate.masked_fill_(gate > call.limit, 0)
        slope_up.masked_fill_(up.abs() > call.limit, 0)
    return inner, slope_gate, slope_up


class _ParameterGradients:
    """Where the gradients of the experts' parameters are summed up: each one's own, at full size, or its sink."""

    def __init__(self, call: ExpertCall, parameters: Sequence[Tensor]) -> None:
        self.call, self.parameters = call, parameters
        self.direct = call.accumulation is Accumulation.DIRECT
        self.full = [
            torch.zeros_like(parameter) if self.direct and trained else None
            for parameter, trained in zip(parameters, call.trained)
        ]

    def _target(self, which: int, index: tuple) -> Tensor:
        if self.direct:
            return self.full[which][index]
        return self.call.sinks[which].slice(self.parameters[which], index)

    def add(self, which: int, expert: int, left: Tensor, right: Tensor) -> None:
        """The slice of a weight's gradient is left^T right; left: [n, rows of it], right: [n, columns of it]."""
        if not self.call.trained[which]:
            return
        target = self._target(which, (expert, slice(0, left.shape[1]), slice(0, right.shape[1])))
        if target.dtype == left.dtype:
            target.addmm_(left.t(), right)
        else:
            target.add_(left.t() @ right)

    def add_bias(self, which: int, expert: int, grad: Tensor) -> None:
        if self.call.trained[which]:
            target = self._target(which, (expert, slice(0, grad.shape[1])))
            target.add_(grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)))

    def results(self) -> list[Tensor | None]:
        if self.call.accumulation is Accumulation.HAND_OVER:
            return [
                sink.take(parameter) if trained else None
                for sink, parameter, trained in zip(self.call.sinks, self.parameters, self.call.trained)
            ]
        return self.full
