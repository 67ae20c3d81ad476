"""Linear maps that use a leading slice of their weights, forward and backward, and add gradients in place.

A plain `F.linear(x, weight[:rows, :cols])` makes autograd write a full-size, zero-padded gradient each time. Here the
gradient of the slice is added to one persistent buffer, and the parameter's own autograd edge, where a data-parallel
engine's hooks sit, is used once in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from megatron_adamba.ops.cpu_linear import product, product_served


class Accumulation(Enum):
    """What a micro-batch's backward does with the gradient of a nested weight."""

    DIRECT = "direct"
    """hand a full-size gradient to autograd each time (ZeRO 2 and 3, offload)"""
    DEFER = "defer"
    """add the slice to the persistent buffer; the parameter's autograd edge is not used"""
    HAND_OVER = "hand over"
    """add the slice, then give the whole buffer to the parameter: the last micro-batch of a step"""


class GradientSink:
    """The persistent gradient buffer of one nested weight, in fp32 (float64 for float64 weights)."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def slice(self, weight: Tensor, index: tuple[slice, ...]) -> Tensor:
        """A view into the buffer, which is made on first use."""
        if self.buffer is None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.buffer = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        return self.buffer[index]

    def take(self, weight: Tensor) -> Tensor:
        """The sum so far in the weight's dtype; the next step starts from zero."""
        buffer = self.slice(weight, ())
        if buffer.dtype == weight.dtype:
            self.buffer = None
            return buffer
        total = buffer.to(weight.dtype)
        buffer.zero_()
        return total


def nested_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    rows: Sequence[int],
    cols: int,
    sinks: Sequence[GradientSink],
    accumulation: Accumulation,
) -> tuple[Tensor, ...]:
    """y_i = x @ weights[i][:rows[i], :cols]^T + biases[i][:rows[i]], for several weights that read the same input.

    x: [..., cols]; weights[i]: [>= rows[i], >= cols]; returns [..., rows[i]] each, in x's dtype.
    sinks: one per weight, then one per bias. Outside the slices gradients are exactly zero.
    """
    parameters = [*weights, *(biases or ())]
    trained = tuple(parameter.requires_grad for parameter in parameters)
    if accumulation is Accumulation.DEFER:
        parameters = [parameter.detach() for parameter in parameters]
    # without any other input that needs a gradient, backward would not be called at all
    anchor = x.new_empty(0).requires_grad_() if any(trained) and torch.is_grad_enabled() else None
    call = _Call(len(weights), tuple(rows), cols, tuple(sinks), accumulation, trained)
    return _NestedLinears.apply(x, anchor, call, *parameters)


class _Call:
    """The parts of a call that are not tensors."""

    __slots__ = ("accumulation", "cols", "num_weights", "rows", "sinks", "trained")

    def __init__(self, num_weights, rows, cols, sinks, accumulation, trained) -> None:
        self.num_weights, self.rows, self.cols = num_weights, rows, cols
        self.sinks, self.accumulation, self.trained = sinks, accumulation, trained


class _NestedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor | None, call: _Call, *parameters: Tensor) -> tuple[Tensor, ...]:
        n = call.num_weights
        ctx.call = call
        ctx.save_for_backward(x, *parameters)
        outputs = []
        for i, rows in enumerate(call.rows):
            bias = parameters[n + i][:rows] if len(parameters) > n else None
            outputs.append(_linear(x, parameters[i][:rows, : call.cols], bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *parameters = ctx.saved_tensors
        call = ctx.call
        n, cols = call.num_weights, call.cols
        x2 = x.flatten(0, -2)
        grad_x = None
        grad_parameters: list[Tensor | None] = [None] * len(parameters)
        for i, rows in enumerate(call.rows):
            g2 = grads[i].flatten(0, -2)
            if ctx.needs_input_grad[0]:
                weight = parameters[i][:rows, :cols]
                grad_x = _add_product(grad_x, g2, weight)
            if call.trained[i]:
                index = (slice(0, rows), slice(0, cols))
                grad_parameters[i] = _weight_gradient(call, i, parameters[i], index, g2, x2)
            if len(parameters) > n and call.trained[n + i]:
                grad_parameters[n + i] = _bias_gradient(call, n + i, parameters[n + i], rows, g2)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, *grad_parameters


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., cols] times the transpose of weight [rows, cols], plus bias."""
    if product_served(x, weight):
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return torch.nn.functional.linear(x, weight, bias)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, in place; without a total, left @ right. left: [m, k]; right: [k, n]."""
    if product_served(left, right.t()):
        result = product(left, right.t())
        return result if total is None else total.add_(result)
    return left @ right if total is None else total.addmm_(left, right)


def _weight_gradient(call: _Call, i: int, weight: Tensor, index: tuple[slice, ...], g2: Tensor, x2: Tensor):
    if call.accumulation is Accumulation.DIRECT:
        if (index[0].stop, index[1].stop) == tuple(weight.shape):
            return _add_product(None, g2.t(), x2)
        full = torch.zeros_like(weight)
        _add_product(full[index], g2.t(), x2)
        return full
    target = call.sinks[i].slice(weight, index)
    if target.dtype == g2.dtype:
        _add_product(target, g2.t(), x2)
    elif g2.is_cuda:
        target.add_(torch.mm(g2.t(), x2, out_dtype=target.dtype))
    else:
        target.add_(g2.t() @ x2)
    return call.sinks[i].take(weight) if call.accumulation is Accumulation.HAND_OVER else None


def _bias_gradient(call: _Call, i: int, bias: Tensor, rows: int, g2: Tensor):
    total = g2.sum(0, dtype=torch.promote_types(g2.dtype, torch.float32))
    if call.accumulation is Accumulation.DIRECT:
        full = torch.zeros_like(bias)
        full[:rows] = total
        return full
    call.sinks[i].slice(bias, (slice(0, rows),)).add_(total)
    return call.sinks[i].take(bias) if call.accumulation is Accumulation.HAND_OVER else None
