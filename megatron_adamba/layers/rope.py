"""The rotary settings of a config, as the kernels take them."""

from __future__ import annotations

from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.ops.rotary import Yarn


def yarn_of(config: ResolvedModel) -> Yarn | None:
    """None where frequencies stay as they are."""
    if config.rope_factor == 1:
        return None
    return Yarn(config.rope_factor, config.rope_original_context, config.rope_beta_fast, config.rope_beta_slow)


def rope_concentration(config: ResolvedModel) -> float:
    """Factor on queries and keys."""
    yarn = yarn_of(config)
    return 1.0 if yarn is None else yarn.concentration
