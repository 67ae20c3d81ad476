"""Learning-rate factor of a step: warm-up, then cosine, WSD or constant."""

from __future__ import annotations

import math

from megatron_adamba.config.sections import OptimizerConfig


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Share of the peak rate that step `step` (from 0) of `steps` uses. A pure function: resuming needs no state."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        return low + (1 - low) * min(1.0, (steps - step) / decay)
    return 1.0
