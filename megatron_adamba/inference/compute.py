"""Active FLOPs of the tokens of one sequence, beside what the whole model would take."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_adamba.blueprint.adaptive_flops import TokenCosts, predictor_flops, token_costs
from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.inference.policy import ComputePolicy, doubled_widths


class ComputeMeter:
    """Counts blocks, state left to skipped blocks, gates and head; attention at its mean over seq_len tokens."""

    def __init__(self, config: ResolvedModel, policy: ComputePolicy, seq_len: int, predicted: bool = False) -> None:
        """predicted: whether the estimator was asked for the widths."""
        plan, adaptive = policy.plan, policy.adaptive
        self.full = forward_flops(config, full_plan(config).widths, seq_len)
        """of a token at full width and depth without gates"""
        self.once = predictor_flops(config) if predicted else 0
        """of the sequence, for its widths"""
        self.widths, self.wide_widths = plan.widths, plan.widths
        self.costs: TokenCosts | None = None
        self.fixed = 0
        """of a token, where it chooses nothing"""
        if adaptive is None:
            self.fixed = forward_flops(config, plan.widths, seq_len, plan.exit_layer)
        else:
            self.wide_widths = doubled_widths(config, plan.widths)
            self.costs = token_costs(config, plan.widths, self.wide_widths, seq_len, adaptive.min_exit_layer)

    def of(self, exit_layer: int, widened_at: int) -> int:
        """FLOPs of one token."""
        return self.fixed if self.costs is None else self.costs.of(exit_layer, widened_at)

    def mean_width(self, exit_layer: int, widened_at: int) -> float:
        """Over the blocks that ran; 0 where none did."""
        narrow, wide = self.widths[: min(exit_layer, widened_at)], self.wide_widths[widened_at:exit_layer]
        return (sum(narrow) + sum(wide)) / exit_layer if exit_layer else 0.0

    def total(self, exit_layers: Sequence[int], widened_at: Sequence[int]) -> int:
        """FLOPs of all tokens of a sequence, and of the choice of its widths."""
        return self.once + sum(map(self.of, exit_layers, widened_at))
