"""Learning from the full pass: the section `distill`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adamba.config.rules import in_range, one_of, usual

FORWARD, REVERSE = "forward", "reverse"


@dataclass
class DistillConfig:
    """Narrow and early-leaving passes learn from the predictions of the full pass of the same tokens."""

    share: float = 0.0
    """of the divergence in their loss; the text has the rest; 0 turns it off. Needs elastic.width_sampling sandwich"""
    temperature: float = 1.0
    """that both predictions are divided by; the divergence counts by its square"""
    divergence: str = FORWARD
    """forward: KL(full pass || narrow pass), which covers all that the full pass expects | reverse: KL(narrow pass ||
    full pass), which keeps to what it expects most"""

    @property
    def on(self) -> bool:
        return self.share > 0

    def check(self) -> None:
        in_range("--distill.share", self.share, 0, 1, 0.5)
        in_range("--distill.temperature", self.temperature, 0.01, 100, usual(self, "temperature"))
        one_of("--distill.divergence", self.divergence, (FORWARD, REVERSE))
