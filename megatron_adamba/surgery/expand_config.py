"""The sizes of a wider model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

from megatron_adamba.blueprint.gates import whole_width
from megatron_adamba.blueprint.growth import sizes_of
from megatron_adamba.blueprint.nest import copy_rows, round_up
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import ConfigError

ADD_HEADS, GROW_DIM = "add-heads", "grow-dim"


@dataclass(frozen=True)
class Sizes:
    """Sizes that are given instead of growing in proportion to the channels; None grows."""

    num_kv_groups: int | None = None
    ffn_size: int | None = None
    expert_ffn_size: int | None = None
    mamba_num_groups: int | None = None

    def given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def grown_config(old: ResolvedModel, hidden: int, heads: str, sizes: Sizes) -> ResolvedModel:
    """The resolved config of the wider model; its nest is the old one and a row more. Raises ConfigError."""
    if hidden <= old.hidden_size:
        raise ConfigError(f"--hidden {hidden}: the source has {old.hidden_size} already; give more, for example "
                          f"--hidden {old.hidden_size + old.hidden_size // 4}")  # fmt: skip
    grown = _with_more_heads if heads == ADD_HEADS else _with_larger_heads
    changes: dict[str, Any] = grown(old, hidden, sizes)
    if "T" in old.block_pattern or old.mamba_use_mlp:
        changes["ffn_size"] = _grown_rows("--ffn-size", old.ffn_size, sizes.ffn_size, old, hidden)
    else:
        changes["ffn_size"] = max(old.ffn_size, sizes.ffn_size or 0)
    if "E" in old.block_pattern:
        rows = _grown_rows("--expert-ffn-size", old.expert_ffn_size, sizes.expert_ffn_size, old, hidden)
        changes["expert_ffn_size"] = rows
    elif sizes.expert_ffn_size is not None:
        raise ConfigError(f"--expert-ffn-size {sizes.expert_ffn_size}: the source has no experts; leave the flag out")
    changes |= _grown_mamba(old, hidden, sizes)
    widest = NestRow(
        width=hidden,
        norm_size=old.nest[-1].norm_size,
        kv_groups=changes.get("num_kv_groups", old.num_kv_groups),
        ffn=changes["ffn_size"],
        expert_ffn=changes.get("expert_ffn_size", 0),
    )
    nest = [*copy_rows(old.nest), widest]
    changes["expanded_from"] = sizes_of(old)
    if old.gate_size:
        changes["estimator_reference"] = whole_width(old)
    return resolve_model(replace(old, hidden_size=hidden, widths=None, nest=nest, **changes))


def _with_more_heads(old: ResolvedModel, hidden: int, sizes: Sizes) -> dict[str, Any]:
    groups = sizes.num_kv_groups
    if groups is None:
        if old.num_kv_groups * hidden % old.hidden_size:
            step = old.hidden_size // gcd(old.num_kv_groups, old.hidden_size)
            raise ConfigError(
                f"--hidden {hidden}: {old.num_kv_groups} KV groups at {old.hidden_size} channels do not grow in "
                f"proportion to a whole number; give a multiple of {step}, for example --hidden "
                f"{round_up(hidden, step)}, or --num-kv-groups {-(-old.num_kv_groups * hidden // old.hidden_size)}"
            )
        groups = old.num_kv_groups * hidden // old.hidden_size
    if groups < old.num_kv_groups:
        raise ConfigError(f"--num-kv-groups {groups}: the source has {old.num_kv_groups}; give at least as many")
    return {"num_kv_groups": groups, "num_heads": old.num_heads // old.num_kv_groups * groups}


def _with_larger_heads(old: ResolvedModel, hidden: int, sizes: Sizes) -> dict[str, Any]:
    if sizes.num_kv_groups not in (None, old.num_kv_groups):
        raise ConfigError(f"--num-kv-groups {sizes.num_kv_groups}: --heads {GROW_DIM} adds none; leave the flag out")
    if old.head_dim * hidden % (2 * old.hidden_size):
        step = 2 * old.hidden_size // gcd(old.head_dim, 2 * old.hidden_size)
        raise ConfigError(
            f"--hidden {hidden}: heads of {old.head_dim} do not grow in proportion to an even number; give a multiple "
            f"of {step}, for example --hidden {round_up(hidden, step)}, or --heads {ADD_HEADS}"
        )
    head_dim = old.head_dim * hidden // old.hidden_size
    return {
        "head_dim": head_dim,
        "head_dim_steps": [*(old.head_dim_steps or [old.head_dim]), head_dim],
    }


def _grown_rows(flag: str, rows: int, given: int | None, old: ResolvedModel, hidden: int) -> int:
    granule = old.ffn_granule
    if given is None:
        return round_up(-(-rows * hidden // old.hidden_size), granule)
    if given < rows or given % granule:
        least = round_up(max(rows, given), granule)
        raise ConfigError(f"{flag} {given}: must be a multiple of {granule}, and {rows} or more; try {least}")
    return given


def _grown_mamba(old: ResolvedModel, hidden: int, sizes: Sizes) -> dict[str, int]:
    """Whole groups more: the norm behind the scan is one of each group. Mamba-1 grows channel by channel, by itself."""
    wanted = sizes.mamba_num_groups
    if "M" not in old.block_pattern or old.mamba_version == 1:
        if wanted is not None:
            raise ConfigError(f"--mamba-num-groups {wanted}: the source has no Mamba-2 blocks; leave the flag out")
        return {}
    groups = old.mamba_num_groups * hidden // old.hidden_size if wanted is None else wanted
    if groups < old.mamba_num_groups:
        least = old.mamba_num_groups
        raise ConfigError(f"--mamba-num-groups {groups}: the source has {least}; give at least as many")
    heads = old.mamba_num_heads // old.mamba_num_groups * groups
    return {"mamba_num_groups": groups, "mamba_num_heads": heads}
