"""Which parameters a phase of training leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_adamba.blueprint.manifest import ParamSpec

PHASES = (1, 2, 3)
"""1 trains Mamba mixers and the norms in front of them, and nothing else; 2 trains everything, exits too; 3 does so
in a model that was made wider, old weights more slowly"""
PHASES_WITH_EXITS = (2, 3)
"""plans leave early now and then, so that every layer learns to be the last"""


def trains_in_phase(spec: ParamSpec, phase: int | None) -> bool:
    """Whether a phase trains a parameter; without a phase everything trains."""
    return phase != 1 or ".mixer." in spec.name or ".mixer_norm." in spec.name


def frozen_specs(specs: Sequence[ParamSpec], groups: Sequence[str], phase: int | None) -> list[ParamSpec]:
    """What `--train.freeze` and `--train.phase` keep from training, together."""
    return [spec for spec in specs if spec.group in groups or not trains_in_phase(spec, phase)]
