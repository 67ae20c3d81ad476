"""A mixture of experts without capacity: every token reaches every expert that it chose."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.moe.experts import Experts
from megatron_adamba.layers.moe.router import Router
from megatron_adamba.ops.permute import Dispatch
from megatron_adamba.parallel.expert import ALL_EXPERTS, ExpertParallel
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class MoE(nn.Module):
    """sum over a token's experts of weight * expert(x), of which router and experts use the leading w channels.

    Under tensor parallelism its ranks share out the tokens, not the experts: each routes its own part of the sequence.
    """

    def __init__(
        self,
        config: ResolvedModel,
        block: int,
        tp: TensorParallel = ALONE,
        ep: ExpertParallel = ALL_EXPERTS,
        device=None,
    ) -> None:
        # not super(): a subclass may bring a second base that only marks the layer
        nn.Module.__init__(self)
        self.block, self.num_experts, self.tp, self.ep = block, config.num_experts, tp, ep
        self.router = Router(config, tp, device)
        self.experts = Experts(config, ep.owned(config.num_experts), device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, w] normed, in the form of the residual stream; returns the same shape."""
        tokens = self.tp.share_tokens(x, context.length)
        logits = self.router(tokens, context)
        choices, weights = self.router.choose(logits)
        dispatch = Dispatch(choices, self.num_experts)
        load = self.tp.sum_over_tokens(dispatch.counts.clone())
        context.statistics.record(self.block, self.router.auxiliary_loss(logits, load), load)
        rows, weights = dispatch.spread(tokens), dispatch.sort(weights.to(x.dtype))
        journey = self.ep.send(dispatch.counts)
        out = self.experts(
            journey.arrive(rows), journey.arrive(weights), journey.counts, row.expert_ffn, context.accumulation
        )
        return self.tp.join_tokens(dispatch.collect(journey.come_back(out)), x, context.length)
