"""Which parameters train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_adamba.blueprint.manifest import GROUPS, ParamSpec, manifest
from megatron_adamba.blueprint.phases import frozen_specs
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.rules import one_of
from megatron_adamba.config.sections import TrainConfig
from megatron_adamba.errors import ConfigError


def freeze_groups(
    module: nn.Module, specs: Sequence[ParamSpec], groups: Sequence[str], phase: int | None = None
) -> int:
    """Turn gradients off for groups of the manifest and for what a phase leaves alone; returns the elements frozen.

    Raises ConfigError for an unknown group and when nothing would be left to train.
    """
    _check_names(groups)
    parameters = dict(module.named_parameters())
    frozen = frozen_specs(specs, groups, phase)
    if len(frozen) == len(specs) and phase == 1:
        raise ConfigError(
            f"--train.phase {phase}: trains Mamba layers, and this model has none that --train.freeze leaves; "
            f"add M blocks to --model.block_pattern"
        )
    if len(frozen) == len(specs):
        raise ConfigError(f"--train.freeze {','.join(groups)}: leaves nothing to train; take one group out")
    for spec in frozen:
        # a pipeline stage holds some of them
        if spec.name in parameters:
            parameters[spec.name].requires_grad_(False)
    return sum(spec.numel for spec in frozen)


def frozen_names(config: ResolvedModel, train: TrainConfig) -> set[str]:
    """Parameters of a resolved config that do not train, by name. Raises ConfigError for an unknown group."""
    _check_names(train.freeze)
    return {spec.name for spec in frozen_specs(manifest(config), train.freeze, train.phase)}


def _check_names(groups: Sequence[str]) -> None:
    for group in groups:
        one_of("--train.freeze", group, GROUPS)
