"""What the gates' raw outputs say, by the kind of target they were trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.config.sections import GatesConfig


@dataclass(frozen=True)
class GateReading:
    """Turns outputs into costs and confidence, and losses into targets; all of any shape."""

    target: str
    """relative | absolute"""
    tau: float

    @classmethod
    def of(cls, config: GatesConfig) -> GateReading:
        return cls(config.target, config.tau)

    def prediction(self, output: Tensor) -> Tensor:
        """In the target's unit: nats that leaving costs, or sigmoid(2 - loss)."""
        # a gate is born with an output above 0: it lets nobody leave, whatever its target
        return F.softplus(output) if self.target == "relative" else torch.sigmoid(-output)

    def wanted(self, exit_loss: Tensor, final_loss: Tensor) -> Tensor:
        """The target of a confidence gate, from the loss of leaving here and that of running to the end."""
        if self.target == "relative":
            return (exit_loss - final_loss).clamp(min=0)
        return torch.sigmoid(2 - exit_loss)

    def confidence(self, output: Tensor) -> Tensor:
        """In [0, 1]; under `absolute` never above sigmoid(2) = 0.88 for a perfect gate."""
        prediction = self.prediction(output)
        return (1 - prediction / self.tau).clamp(min=0) if self.target == "relative" else prediction
