"""What the full pass of a micro-batch leaves behind for its narrower passes to learn from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_adamba.config.distill import REVERSE, DistillConfig
from megatron_adamba.ops.linear_distillation import DistillationLoss


def distillation_loss(config: DistillConfig) -> DistillationLoss | None:
    """None where it is off."""
    if not config.on:
        return None
    return DistillationLoss(config.share, config.temperature, config.divergence == REVERSE)


@dataclass
class Lesson:
    """One micro-batch's: filled by the pass that teaches, read by those that learn. No logits are kept, as the head
    makes them again from the states."""

    loss: DistillationLoss
    states: Tensor | None = None
    """[batch, seq, hidden_size] in front of the head, normed, in the form of the residual stream, without gradient"""

    def teach(self, states: Tensor) -> None:
        self.states = states.detach()

    def taught(self) -> Tensor:
        assert self.states is not None, "the full pass comes first"
        return self.states
