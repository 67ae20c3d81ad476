"""The experts of a mixture by grouped matrix products: one kernel for all experts, and no count known to the host."""

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

_ALIGNMENT = 16
"""bytes that rows of every operand start at a multiple of (`torch.nn.functional.grouped_mm`)"""


def grouped_served(x: Tensor, parameters: Sequence[Tensor], rows: int) -> bool:
    """Whether the grouped kernels take these: bf16 on CUDA devices of compute capability 8.0 or more."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")):
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0) or any(p.dtype != x.dtype for p in parameters):
        return False
    sizes = (rows, x.shape[1], *parameters[GATE].shape[1:])
    return x.shape[0] > 0 and all(size * x.element_size() % _ALIGNMENT == 0 for size in sizes)


class GroupedExperts(torch.autograd.Function):
    """Keeps x and what comes out of gate and up; the activation is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weights, anchor, call: ExpertCall, *parameters):
        groups = _Groups(call, x.shape[0])
        gate = groups.forward(x, parameters, GATE, GATE_BIAS)
        up = groups.forward(x, parameters, UP, UP_BIAS)
        y = groups.forward(activation(gate, up, call), parameters, DOWN, DOWN_BIAS)
        ctx.save_for_backward(x, weights, gate, up, *parameters)
        ctx.call = call
        return y.mul_(weights.unsqueeze(1))

    @staticmethod
    def backward(ctx, grad):
        x, weights, gate, up, *parameters = ctx.saved_tensors
        call = ctx.call
        groups, sums = _Groups(call, x.shape[0]), ExpertGradients(call, parameters)
        grad = grad.contiguous()
        high = torch.promote_types(x.dtype, torch.float32)
        inner, slope_gate, slope_up = activation_and_slopes(gate, up, call)
        plain = groups.backward(grad, parameters, DOWN)
        grad_weights = (plain * inner).sum(1, dtype=high)
        grad_weights += (grad * groups.bias(parameters, DOWN_BIAS)).sum(1, dtype=high)
        scaled = grad * weights.unsqueeze(1)
        groups.sum_into(sums, DOWN, DOWN_BIAS, scaled, inner)
        plain.mul_(weights.unsqueeze(1))
        grad_gate, grad_up = slope_gate.mul_(plain), slope_up.mul_(plain)
        groups.sum_into(sums, GATE, GATE_BIAS, grad_gate, x)
        groups.sum_into(sums, UP, UP_BIAS, grad_up, x)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = groups.backward(grad_gate, parameters, GATE).add_(groups.backward(grad_up, parameters, UP))
        return grad_x, grad_weights.to(weights.dtype), None, None, *sums.results()


class _Groups:
    """Rows by expert as the grouped kernels want them."""

    def __init__(self, call: ExpertCall, n: int) -> None:
        self.call = call
        experts = torch.arange(call.counts.numel(), device=call.counts.device)
        # with the size given the device need not be asked for it
        self.expert = torch.repeat_interleave(experts, call.counts, output_size=n)
        self.ends = call.counts.cumsum(0).to(torch.int32)

    def forward(self, x: Tensor, parameters: Sequence[Tensor], which: int, bias: int) -> Tensor:
        """Each row [columns] by its expert's weight [rows, columns], plus its bias: [n, rows]."""
        weight = self.call.used(parameters[which], which)
        y = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=self.ends)
        return y.add_(self.bias(parameters, bias))

    def backward(self, grad: Tensor, parameters: Sequence[Tensor], which: int) -> Tensor:
        """Each row [rows] by the transpose of its expert's weight: [n, columns]."""
        return torch.nn.functional.grouped_mm(grad, self.call.used(parameters[which], which), offs=self.ends)

    def bias(self, parameters: Sequence[Tensor], which: int) -> Tensor:
        return self.call.used(parameters[which], which).index_select(0, self.expert)

    def sum_into(self, sums: ExpertGradients, which: int, bias: int, left: Tensor, right: Tensor) -> None:
        """Gradients of a weight, left^T right by expert, and of its bias, the sums of left by expert."""
        if self.call.trained[which]:
            sums.add_all(which, torch.nn.functional.grouped_mm(left.t(), right, offs=self.ends))
        if self.call.trained[bias]:
            # a product with ones and zeros sums in fp32 and always in the same order, which atomics would not
            member = torch.nn.functional.one_hot(self.expert, self.ends.numel()).to(left.dtype)
            high = torch.promote_types(left.dtype, torch.float32)
            if left.is_cuda and left.dtype != high:
                sums.add_all(bias, torch.mm(member.t(), left, out_dtype=high))
            else:
                sums.add_all(bias, member.t().to(high) @ left.to(high))
