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
from megatron_adamba.ops.exchange import InputExchange


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
    exchange: InputExchange | None = None,
    add_bias: bool = True,
) -> tuple[Tensor, ...]:
    """y_i = x @ weights[i][:rows[i], :cols]^T + biases[i][:rows[i]], for several weights that read the same input.

    x: [..., cols]; weights[i]: [>= rows[i], >= cols]; returns [..., rows[i]] each, in x's dtype.
    sinks: one per weight, then one per bias. Outside the slices gradients are exactly zero.
    exchange: where other ranks hold further rows of the same maps. x is then what this rank holds of the input, and the
    sum of its gradient travels while the gradients of the weights are computed.
    add_bias: False leaves the biases out of y though their gradients are computed: of ranks whose y are summed up,
    one adds them.
    """
    parameters = [*weights, *(biases or ())]
    trained = tuple(parameter.requires_grad for parameter in parameters)
    if accumulation is Accumulation.DEFER:
        parameters = [parameter.detach() for parameter in parameters]
    call = _Call(len(weights), tuple(rows), cols, tuple(sinks), accumulation, trained, exchange, add_bias)
    if not torch.is_grad_enabled():
        return _outputs(call, x, parameters)
    # without any other input that needs a gradient, backward would not be called at all
    anchor = x.new_empty(0).requires_grad_() if any(trained) else None
    return _NestedLinears.apply(x, anchor, call, *parameters)


class _Call:
    """The parts of a call that are not tensors."""

    __slots__ = ("accumulation", "add_bias", "cols", "exchange", "num_weights", "rows", "sinks", "trained")

    def __init__(self, num_weights, rows, cols, sinks, accumulation, trained, exchange, add_bias) -> None:
        self.num_weights, self.rows, self.cols = num_weights, rows, cols
        self.sinks, self.accumulation, self.trained = sinks, accumulation, trained
        self.exchange, self.add_bias = exchange, add_bias


class _NestedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor | None, call: _Call, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(x, *parameters)
        return _outputs(call, x, parameters)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *parameters = ctx.saved_tensors
        call, exchange = ctx.call, ctx.call.exchange
        grads2 = [grad.flatten(0, -2) for grad in grads]
        whole = None
        if exchange is not None and any(call.trained[: call.num_weights]):
            whole = exchange.start_gather(x)
        grad_x = _input_gradient(call, parameters, grads2) if ctx.needs_input_grad[0] else None
        reduced = None
        if grad_x is not None:
            grad_x = grad_x.view(*grads[0].shape[:-1], call.cols)
            reduced = None if exchange is None else exchange.start_reduce(grad_x)
        x2 = (x if whole is None else whole.wait()).flatten(0, -2)
        grad_parameters = _parameter_gradients(call, parameters, grads2, x2)
        if reduced is not None:
            grad_x = reduced.wait()
        return grad_x, None, None, *grad_parameters


def _outputs(call: _Call, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    n = call.num_weights
    if call.exchange is not None:
        x = call.exchange.gather(x)
    outputs = []
    for i, rows in enumerate(call.rows):
        bias = parameters[n + i][:rows] if len(parameters) > n and call.add_bias else None
        outputs.append(_linear(x, parameters[i][:rows, : call.cols], bias))
    return tuple(outputs)


def _input_gradient(call: _Call, parameters: list[Tensor], grads2: list[Tensor]) -> Tensor | None:
    grad_x: Tensor | None = None
    for weight, rows, g2 in zip(parameters, call.rows, grads2):
        grad_x = _add_product(grad_x, g2, weight[:rows, : call.cols])
    return grad_x


def _parameter_gradients(
    call: _Call, parameters: list[Tensor], grads2: list[Tensor], x2: Tensor
) -> list[Tensor | None]:
    n = call.num_weights
    grad_parameters: list[Tensor | None] = [None] * len(parameters)
    for i, (rows, g2) in enumerate(zip(call.rows, grads2)):
        if call.trained[i]:
            index = (slice(0, rows), slice(0, call.cols))
            grad_parameters[i] = _weight_gradient(call, i, parameters[i], index, g2, x2)
        if len(parameters) > n and call.trained[n + i]:
            grad_parameters[n + i] = _bias_gradient(call, n + i, parameters[n + i], rows, g2)
    return grad_parameters


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
