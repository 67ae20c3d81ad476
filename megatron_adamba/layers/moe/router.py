"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.moe.statistics import balance_loss, router_z_loss
from megatron_adamba.ops.nested_linear import GradientSink, nested_linears
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class Router(nn.Module):
    """A linear map with bias from a token to a logit for each expert. Parameters: weight [experts, width], bias.

    Its forward returns a tensor and nothing else, so that whoever gathers a module's parameters around its call can
    hook on to what comes back.
    """

    def __init__(self, config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> None:
        super().__init__()
        self.tp = tp
        self.k = config.experts_per_token
        self.balance_weight, self.z_weight = config.router_balance_weight, config.router_z_weight
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.widths[-1], device=device))
        self.bias = nn.Parameter(torch.empty(config.num_experts, device=device))
        self.sinks = (GradientSink(), GradientSink())

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x: [tokens, w]; returns logits [tokens, experts] in fp32 or better."""
        rows = (self.bias.shape[0],)
        # every tensor-parallel rank routes its own tokens
        weight, bias = self.tp.sum_token_gradient(self.weight), self.tp.sum_token_gradient(self.bias)
        (logits,) = nested_linears(x, [weight], [bias], rows, x.shape[-1], self.sinks, context.accumulation)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, [tokens, k] int64, best first, and the softmax over their logits, [tokens, k]."""
        best, choices = logits.topk(self.k, dim=-1)
        return choices, best.softmax(-1)

    def auxiliary_loss(self, logits: Tensor, load: Tensor) -> Tensor | None:
        """Weighted sum of balancing and z losses of the micro-batch, a scalar; None where there is none, or the router
        does not train.

        logits: [tokens of this rank, experts]; load: [experts], choices that each expert got from all tokens.
        """
        if not self.weight.requires_grad or not (self.balance_weight or self.z_weight):
            return None
        parts = torch.cat([logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum().unsqueeze(0)])
        sums = self.tp.sum_over_tokens(parts)
        tokens = load.sum() / self.k
        loss = self.balance_weight * balance_loss(sums[:-1], load, tokens)
        return loss + self.z_weight * router_z_loss(sums[-1], tokens)
