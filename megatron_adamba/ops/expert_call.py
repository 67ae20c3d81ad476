"""What the two ways of running a mixture's experts share: the call, the activation, where gradients go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.ops.nested_linear import Accumulation, GradientSink

GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = range(6)


@dataclass(frozen=True)
class ExpertCall:
    """The parts of a call that are not differentiated."""

    counts: Tensor
    """[experts] int64, tokens of each expert, which lie one expert after the other"""
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

    def lengths(self, which: int) -> tuple[int, ...]:
        """Leading sizes that are used of one expert's part of a parameter."""
        rows, cols = self.rows, self.cols
        return ((rows, cols), (rows, cols), (cols, rows), (rows,), (rows,), (cols,))[which]

    def used(self, parameter: Tensor, which: int) -> Tensor:
        """The slice of a parameter, [experts, ...], that all experts use; a view."""
        return parameter[(slice(None), *(slice(0, length) for length in self.lengths(which)))]


def activation(gate: Tensor, up: Tensor, call: ExpertCall) -> Tensor:
    """`clamped_swiglu` of gate and up, [n, rows] each, with fewer temporaries."""
    if call.limit:
        gate, up = gate.clamp(max=call.limit), up.clamp(-call.limit, call.limit)
    return (gate * call.slope).sigmoid_().mul_(gate).mul_(up + 1)


def activation_and_slopes(gate: Tensor, up: Tensor, call: ExpertCall) -> tuple[Tensor, Tensor, Tensor]:
    """The activation and its derivatives by gate and up, [n, rows] each; zero where a clamp holds."""
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
        _keep_within(slope_gate, gate, -math.inf, call.limit)
        _keep_within(slope_up, up, -call.limit, call.limit)
    return inner, slope_gate, slope_up


def _keep_within(slope: Tensor, x: Tensor, low: float, high: float) -> None:
    """Zero in place where x is outside of [low, high]; one pass, where a comparison and a fill need two slow ones.

    The bounds of hardtanh_backward are excluded, so it gets the next numbers outside, which x's dtype can tell apart.
    """
    bounds = torch.tensor((low, high), dtype=x.dtype)
    low, high = torch.nextafter(bounds, bounds * math.inf).tolist()
    torch.ops.aten.hardtanh_backward.grad_input(slope, x, low, high, grad_input=slope)


class ExpertGradients:
    """Where the gradients of the experts' parameters are summed up: each one's own, at full size, or its sink."""

    def __init__(self, call: ExpertCall, parameters: Sequence[Tensor]) -> None:
        self.call, self.parameters = call, parameters
        self.direct = call.accumulation is Accumulation.DIRECT
        self.full: dict[int, Tensor] = {}
        if not self.direct:
            return
        for which, (parameter, trained) in enumerate(zip(parameters, call.trained)):
            if trained:
                whole = call.used(parameter, which).shape == parameter.shape
                self.full[which] = torch.empty_like(parameter) if whole else torch.zeros_like(parameter)

    def clear(self, expert: int) -> None:
        """An expert without rows; every expert needs this or its products and sums, once."""
        for full in self.full.values():
            full[expert].zero_()

    def add_product(self, which: int, expert: int, left: Tensor, right: Tensor) -> None:
        """One expert's gradient of a weight is left^T right; left: [n, its rows], right: [n, its columns]."""
        if not self.call.trained[which]:
            return
        if self.direct:
            torch.mm(left.t(), right, out=self.call.used(self.full[which], which)[expert])
            return
        target = self._slice(which)[expert]
        if target.dtype == left.dtype:
            target.addmm_(left.t(), right)
        elif left.is_cuda:
            target.add_(torch.mm(left.t(), right, out_dtype=target.dtype))
        else:
            target.add_(left.t() @ right)

    def add_sum(self, which: int, expert: int, grad: Tensor) -> None:
        """One expert's gradient of a bias is the sum of grad [n, its length] over n."""
        if not self.call.trained[which]:
            return
        if self.direct:
            self.call.used(self.full[which], which)[expert] = grad.sum(0)
        else:
            target = self._slice(which)[expert]
            target.add_(grad.sum(0, dtype=target.dtype))

    def add_all(self, which: int, grads: Tensor) -> None:
        """grads: [experts, ...], the slice's gradient of every expert at once."""
        if not self.call.trained[which]:
            return
        if not self.direct:
            self._slice(which).add_(grads)
        elif grads.shape == self.parameters[which].shape and grads.dtype == self.parameters[which].dtype:
            self.full[which] = grads
        else:
            self.call.used(self.full[which], which).copy_(grads)

    def _slice(self, which: int) -> Tensor:
        lengths = (slice(None), *(slice(0, length) for length in self.call.lengths(which)))
        return self.call.sinks[which].slice(self.parameters[which], lengths)

    def results(self) -> list[Tensor | None]:
        """One gradient a parameter, None where there is none to hand to autograd."""
        if self.call.accumulation is Accumulation.HAND_OVER:
            return [
                sink.take(parameter) if trained else None
                for sink, parameter, trained in zip(self.call.sinks, self.parameters, self.call.trained)
            ]
        return [self.full.get(which) for which in range(len(self.parameters))]
