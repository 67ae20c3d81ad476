"""What a wider model kept of the one that it was made from: old places and new ones along every axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.manifest import ParamSpec, mamba1_dt_rank
from megatron_adamba.blueprint.nest import copy_rows
from megatron_adamba.config.resolved import ResolvedModel

_SIZES = (
    "hidden_size",
    "num_heads",
    "num_kv_groups",
    "head_dim",
    "ffn_size",
    "expert_ffn_size",
    "mamba_num_heads",
    "mamba_num_groups",
)


@dataclass(frozen=True)
class AxisGrowth:
    """Runs of old places along an axis, each followed by its new places."""

    runs: tuple[tuple[int, int], ...]
    """(places in the old tensor, places in the new one) of each run"""

    def kept(self) -> list[tuple[slice, slice]]:
        """(in the old tensor, in the new one) of each run's old places."""
        places, old, new = [], 0, 0
        for before, after in self.runs:
            places.append((slice(old, old + before), slice(new, new + before)))
            old, new = old + before, new + after
        return places

    def added(self) -> list[slice]:
        """Each run's new places, in the new tensor."""
        places, new = [], 0
        for before, after in self.runs:
            if after > before:
                places.append(slice(new + before, new + after))
            new += after
        return places


def sizes_of(config: ResolvedModel) -> dict[str, int]:
    """What `ModelConfig.expanded_from` remembers of a resolved config."""
    return {name: value for name in _SIZES if (value := getattr(config, name)) is not None}


def before_expansion(config: ResolvedModel) -> ResolvedModel | None:
    """The config that an expanded one was made from; None where it was not. Both are resolved."""
    if config.expanded_from is None:
        return None
    rows = copy_rows(config.nest[:-1])
    steps = config.head_dim_steps
    if steps is not None and config.head_dim != config.expanded_from["head_dim"]:
        steps = steps[:-1] if len(steps) > 2 else None
    sizes: dict[str, Any] = dict(config.expanded_from)
    return replace(
        config, **sizes, nest=rows, widths=[row.width for row in rows], head_dim_steps=steps, expanded_from=None
    )


def growth_of(old: ResolvedModel, new: ResolvedModel) -> dict[str, tuple[AxisGrowth, ...]]:
    """By parameter, which all have the same names in both: how each of its axes grew."""
    before = {spec.name: spec for spec in stored_manifest(old)}
    return {spec.name: _axes(old, new, before[spec.name], spec) for spec in stored_manifest(new)}


def _axes(old: ResolvedModel, new: ResolvedModel, before: ParamSpec, after: ParamSpec) -> tuple[AxisGrowth, ...]:
    axes = [AxisGrowth(((a, b),)) for a, b in zip(before.shape, after.shape)]
    axis = before.unit_axis
    if axis is not None:
        runs = zip(before.parts, after.parts)
        axes[axis] = AxisGrowth(tuple((a, b) for (a, _), (b, _) in runs))
    if before.name.endswith("x_proj.weight"):
        # rows of dt, B and C, of which dt's grow
        state = old.mamba_d_state
        axes[0] = AxisGrowth(((mamba1_dt_rank(old), mamba1_dt_rank(new)), (state, state), (state, state)))
    by_head = before.unit == "kv_group" and not before.name.endswith("sinks")
    if axis is not None and by_head and old.head_dim != new.head_dim:
        # queries and keys grow inside each half, which rotation takes together; values at their end
        halves = 2 if before.name.rsplit(".", 1)[-1][0] in "qk" else 1
        run = (old.head_dim // halves, new.head_dim // halves)
        axes[axis] = AxisGrowth((run,) * (before.shape[axis] // old.head_dim * halves))
    return tuple(axes)
