"""What another phase, or other frozen groups, change in a run that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_adamba.blueprint.manifest import GROUPS, ParamSpec
from megatron_adamba.blueprint.phases import frozen_specs
from megatron_adamba.config.sections import TrainConfig


def describe_phase_change(specs: Sequence[ParamSpec], before: Any, after: TrainConfig) -> str | None:
    """A line on which groups train now and did not before, and the other way round; None where that did not change.

    before: the `train` section of the earlier run's config; where it is none, nothing is said.
    """
    if not isinstance(before, Mapping):
        return None
    old = {spec.name for spec in frozen_specs(specs, before.get("freeze") or (), before.get("phase"))}
    new = {spec.name for spec in frozen_specs(specs, after.freeze, after.phase)}
    changes = [f"now trains {_counted(specs, old - new)}"] if old - new else []
    changes += [f"no longer trains {_counted(specs, new - old)}"] if new - old else []
    if not changes and before.get("phase") == after.phase:
        return None
    names = [f"phase {phase}" if phase else "no phase" for phase in (before.get("phase"), after.phase)]
    return f"{names[0]} -> {names[1]}: {'; '.join(changes) or 'the same parameters train'}"


def _counted(specs: Sequence[ParamSpec], names: set[str]) -> str:
    """`1,024 parameters (attention, mlp)`."""
    chosen = [spec for spec in specs if spec.name in names]
    groups = [group for group in GROUPS if any(spec.group == group for spec in chosen)]
    return f"{sum(spec.numel for spec in chosen):,} parameters ({', '.join(groups)})"
