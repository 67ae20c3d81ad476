"""What the gates' raw outputs say, by the kind of target they were trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.config.sections import GatesConfig

_SMALLEST_COST = 1e-8
"""nats; nothing is learnt from what is less"""


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


def deviance(prediction: Tensor, wanted: Tensor) -> Tensor:
    """wanted log(wanted / prediction) - wanted + prediction, of non-negative values of one shape: half the deviance of
    Poisson regression (McCullagh and Nelder, Generalized Linear Models, table 2.1), 1e-8 added under the logarithm.

    It is a Bregman divergence, so that the mean is its best prediction as it is of the squared error (Banerjee et al.
    2005, theorem 1), but an error counts in proportion to what is predicted.
    """
    logs = torch.special.xlogy(wanted, wanted) - wanted * torch.log(prediction + _SMALLEST_COST)
    return logs - wanted + prediction
