"""What the gates' raw outputs say, by the kind of target they were trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.config.sections import COST_TARGETS, GatesConfig

_SMALLEST_COST = 1e-8
"""nats; nothing is learnt from what is less"""


@dataclass(frozen=True)
class GateReading:
    """Turns outputs into costs and confidence, and losses into targets; all of any shape."""

    target: str
    """relative | signed | divergence | absolute"""
    tau: float

    @classmethod
    def of(cls, config: GatesConfig) -> GateReading:
        return cls(config.target, config.tau)

    @property
    def _in_nats(self) -> bool:
        return self.target in COST_TARGETS

    def prediction(self, output: Tensor) -> Tensor:
        """In the target's unit: nats that leaving costs, never negative; or sigmoid(2 - loss)."""
        # a gate is born with an output above 0: it lets nobody leave, whatever its target
        return F.softplus(output) if self._in_nats else torch.sigmoid(-output)

    def wanted(self, exit_loss: Tensor, final_loss: Tensor) -> Tensor:
        """The target of a confidence gate, from the loss of leaving here and that of running to the end; that of
        `divergence` is no matter of losses."""
        assert self.target != "divergence"
        if not self._in_nats:
            return torch.sigmoid(2 - exit_loss)
        cost = exit_loss - final_loss
        return cost if self.target == "signed" else cost.clamp(min=0)

    def confidence(self, output: Tensor) -> Tensor:
        """In [0, 1]; under `absolute` never above sigmoid(2) = 0.88 for a perfect gate."""
        prediction = self.prediction(output)
        return (1 - prediction / self.tau).clamp(min=0) if self._in_nats else prediction


def deviance(prediction: Tensor, wanted: Tensor) -> Tensor:
    """wanted log(wanted / (prediction + e)) - wanted + prediction, e = 1e-8, predictions never negative: half
    the deviance of Poisson regression (McCullagh and Nelder, Generalized Linear Models, table 2.1).

    It is a Bregman divergence, so that the mean is its best prediction as it is of the squared error (Banerjee et al.
    2005, theorem 1), but an error counts in proportion to what is predicted. What depends on the prediction is linear
    in `wanted`, so that the mean stays the best where some are negative; for such a one it is
    prediction - wanted log((prediction + e) / e), which is 0 at the prediction nearest to it, 0.
    """
    gained = wanted.clamp(max=0)
    cost = wanted - gained
    constant = torch.special.xlogy(cost, cost) - cost + gained * math.log(_SMALLEST_COST)
    return prediction - wanted * torch.log(prediction + _SMALLEST_COST) + constant
