"""Which rotary frequencies YaRN stretches: the range, and the settings that give none."""

from __future__ import annotations

import math

from megatron_adamba.errors import ConfigError

TURN = 2 * math.pi


def yarn_range(
    head_dim: int, theta: float, original_context: int, beta_fast: float, beta_slow: float
) -> tuple[float, float]:
    """Indices of the frequencies that make beta_fast and beta_slow turns in the original context, held within the head
    (arXiv 2309.00071, section 3.2). theta: above 1."""
    place = lambda turns: head_dim / 2 * math.log(original_context / (turns * TURN)) / math.log(theta)
    return max(place(beta_fast), 0.0), min(place(beta_slow), head_dim - 1.0)


def check_yarn(head_dims: list[int], theta: float, original_context: int, beta_fast: float, beta_slow: float) -> None:
    """Refuse what leaves no range to stretch, on which implementations differ.

    head_dims: a head's size at birth and what each later step added. Raises ConfigError.
    """
    if theta <= 1:
        raise ConfigError(f"--model.rope_theta {theta:g}: must be above 1 for YaRN, for example 10000")
    if beta_fast < beta_slow:
        raise ConfigError(
            f"--model.rope_beta_fast {beta_fast:g}: must not be below --model.rope_beta_slow {beta_slow:g}; swap the "
            f"two, or take 32 and 1"
        )
    if original_context <= beta_slow * TURN:
        raise ConfigError(
            f"--model.rope_original_context {original_context}: is too short for --model.rope_beta_slow {beta_slow:g} "
            f"turns of the fastest frequency; must be {math.floor(beta_slow * TURN) + 1} or more, for example 4096"
        )
    for size in head_dims:
        low, high = yarn_range(size, theta, original_context, beta_fast, beta_slow)
        if low > high:
            raise ConfigError(
                f"--model.rope_theta {theta:g}: is too small, every frequency makes more than "
                f"--model.rope_beta_fast {beta_fast:g} turns in --model.rope_original_context {original_context}; for "
                f"example 10000"
            )
