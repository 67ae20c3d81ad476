"""How much compute a sequence gets: its widths, and when its tokens leave or widen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.blueprint.gates import whole_width
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.rules import at_least, in_range, one_of, usual
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.layers.gates import Gates

NEVER = math.inf


@dataclass(frozen=True)
class AdaptivePolicy:
    """When a token leaves and when it is given more width."""

    exit_threshold: float = 0.95
    """confidence above which a token leaves; 1 keeps every token to the end"""
    expand_cost: float = 0.5
    """expected nats lost to the width above which a token's remaining layers are doubled, infinite for never; under
    `absolute` gates that is a confidence under this, 0 for never"""
    min_exit_layer: int = 1
    """blocks that run before the earliest exit"""
    min_width: int = 1
    """the estimator chooses no width under it: narrow blocks know later that a token may leave"""
    exit_per: str = "token"
    """token | sequence: all tokens that arrive together leave where the last one's gate says so"""

    def check(self) -> None:
        """Raises ConfigError."""
        in_range("--exit-threshold", self.exit_threshold, 0, 1, usual(self, "exit_threshold"))
        at_least("--expand-cost", self.expand_cost, 0, usual(self, "expand_cost"), infinite=True)
        at_least("--min-exit-layer", self.min_exit_layer, 1)
        at_least("--min-width", self.min_width, 1)
        one_of("--exit-per", self.exit_per, ("token", "sequence"))

    def leaves(self, gates: Gates, reading: GateReading, blocks: int, x: Tensor) -> Tensor:
        """Which tokens leave behind so many blocks, [...] bool; x: [..., hidden_size]."""
        confident = reading.confidence(gates.leaving(blocks, x)) > self.exit_threshold
        return confident[..., -1:].expand_as(confident) if self.exit_per == "sequence" else confident

    def widens(self, gates: Gates, reading: GateReading, blocks: int, x: Tensor) -> Tensor:
        """Which tokens take the doubled width from here on, [...] bool; x: [..., hidden_size]."""
        if reading.target == "absolute":
            return reading.confidence(gates.leaving(blocks, x)) < self.expand_cost
        return F.softplus(gates.widening(blocks, x)) > self.expand_cost


@dataclass(frozen=True)
class ComputePolicy:
    """Of one sequence."""

    plan: ElasticPlan
    """widths as long as a token is not widened; no block runs from its exit layer on"""
    adaptive: AdaptivePolicy | None = None
    """None: gates are not asked"""

    def with_widths(self, widths: tuple[int, ...]) -> ComputePolicy:
        return replace(self, plan=replace(self.plan, widths=widths))


def doubled_widths(config: ResolvedModel, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Per block the narrowest row of the nest that is at least twice as wide, or the widest."""
    known = [row.width for row in config.nest]
    return tuple(next((width for width in known if width >= 2 * chosen), known[-1]) for chosen in widths)


def predicted_widths(
    config: ResolvedModel,
    scores: Tensor,
    regret_scale: float,
    shares: Tensor,
    energy_price: float | None,
    min_width: int = 1,
) -> tuple[int, ...]:
    """Per block a width of the nest from the estimator's scores, [num_layers] in [0, 1].

    Without a price the narrowest width that is at least the score's share of the whole width. With one the width with
    the least regret_scale * score * (1 - width / whole width)^2 + energy_price * share, at an infinite one the least
    share; shares: [num_layers, widths] of the whole model's compute. Widths under min_width are left out, all but the
    widest.
    """
    widths = torch.tensor([row.width for row in config.nest], dtype=torch.float64)
    scores = scores.detach().double().cpu()[:, None]
    allowed = widths >= min(min_width, config.nest[-1].width)
    if energy_price is None:
        enough = (widths >= scores * whole_width(config)) & allowed
        chosen = torch.where(enough.any(1), enough.int().argmax(1), len(widths) - 1)
    else:
        regret = regret_scale * scores * (1 - widths / whole_width(config)).clamp(min=0).square()
        cost = shares if energy_price == math.inf else regret + energy_price * shares
        chosen = cost.masked_fill(~allowed, torch.inf).argmin(1)
    return tuple(int(widths[index]) for index in chosen)
