"""The nest: one row a width, filled by rule when a model is created and kept as a table from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import ConfigError

MODE_REFERENCE = 2048
"""hidden size from which on a mode's width is taken as it is; smaller models scale it"""


def round_up(value: float, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple


def default_nest(config: ResolvedModel) -> list[NestRow]:
    """Rows for `config.widths`: kv_groups(w) = ceil(kv_heads w / H), ffn(w) = F w / H up to the next granule."""
    hidden = config.hidden_size
    rows = []
    for width in config.widths:
        rows.append(
            NestRow(
                width=width,
                norm_size=width,
                kv_groups=-(-config.num_kv_groups * width // hidden),
                ffn=_ffn_rows(config.ffn_size, width, config),
                expert_ffn=_ffn_rows(config.expert_ffn_size, width, config) if "E" in config.block_pattern else 0,
            )
        )
    return rows


def _ffn_rows(size: int, width: int, config: ResolvedModel) -> int:
    return min(round_up(-(-size * width // config.hidden_size), config.ffn_granule), size)


def check_nest(config: ResolvedModel) -> None:
    """Refuse a table that does not fit the model. Raises ConfigError naming the row and a value that works."""
    rows = config.nest
    if not rows:
        raise ConfigError(f"--model.nest: is empty; leave it out, or give --model.widths [{config.hidden_size}]")
    widths = [row.width for row in rows]
    if widths != sorted(set(widths)) or widths[0] < 1:
        raise ConfigError(
            f"--model.widths {widths}: must ascend without repeats; try {sorted({abs(w) for w in widths})}"
        )
    if config.layer_widths is not None:
        _check_layer_widths(config, config.layer_widths, widths)
    elif widths[-1] != config.hidden_size:
        raise ConfigError(
            f"--model.widths {widths}: the last width must be the hidden size; "
            f"try {[w for w in widths if w < config.hidden_size] + [config.hidden_size]}"
        )
    for row in rows:
        _check_row(config, row)


def _check_layer_widths(config: ResolvedModel, own: list[int], widths: list[int]) -> None:
    depth = config.num_layers
    where = f"--model.layer_widths {own}"
    if len(own) != depth:
        raise ConfigError(f"{where}: lists {len(own)} widths for {depth} blocks; try {[widths[-1]] * depth}")
    for width in own:
        if width not in widths:
            raise ConfigError(f"{where}: {width} is not in the nest {widths}; try {nearest_width(widths, width)}")
    if widths[-1] != max(own) or widths[-1] > config.hidden_size:
        raise ConfigError(
            f"{where}: the nest {widths} must end at the largest of them, {max(own)}, and within the hidden size "
            f"{config.hidden_size}; try --model.widths {[w for w in widths if w <= min(max(own), config.hidden_size)]}"
        )


def _check_row(config: ResolvedModel, row: NestRow) -> None:
    where = f"--model.nest row of width {row.width}"
    if not 1 <= row.kv_groups <= config.num_kv_groups:
        raise ConfigError(f"{where}: kv_groups {row.kv_groups} must lie between 1 and {config.num_kv_groups}")
    if row.ffn % config.ffn_granule or not config.ffn_granule <= row.ffn <= config.ffn_size:
        raise ConfigError(
            f"{where}: ffn {row.ffn} must be a multiple of ffn_granule {config.ffn_granule} up to {config.ffn_size}; "
            f"try {round_up(min(row.ffn, config.ffn_size), config.ffn_granule)}"
        )
    if "E" in config.block_pattern and (
        row.expert_ffn % config.ffn_granule or not config.ffn_granule <= row.expert_ffn <= config.expert_ffn_size
    ):
        raise ConfigError(
            f"{where}: expert_ffn {row.expert_ffn} must be a multiple of ffn_granule {config.ffn_granule} up to "
            f"{config.expert_ffn_size}; try {_ffn_rows(config.expert_ffn_size, row.width, config)}"
        )
    if row.norm_size < 1:
        raise ConfigError(f"{where}: norm_size {row.norm_size} must be 1 or more; try {row.width}")


def mode_width(config: ResolvedModel, mode: str) -> int:
    """The width that a mode's name stands for in this model.

    `think` is all channels; the others come from `config.modes`, below a hidden size of 2048 scaled by
    hidden_size / 2048 and taken to the nearest width of the nest. Raises ConfigError for an unknown mode.
    """
    widths = [row.width for row in config.nest]
    if mode == "think":
        return widths[-1]
    if mode not in config.modes:
        known = ", ".join([*config.modes, "think"])
        raise ConfigError(f"mode {mode}: unknown; modes of this model are {known}")
    target = config.modes[mode] * min(1.0, config.hidden_size / MODE_REFERENCE)
    return nearest_width(widths, target)


def nearest_width(widths: Sequence[int], target: float) -> int:
    """The narrower one of two that are as near."""
    return min(widths, key=lambda width: (abs(width - target), width))


def row_index(config: ResolvedModel, width: int) -> int:
    """Place of `width` in the nest. Raises ConfigError for a width that is not in it."""
    widths = [row.width for row in config.nest]
    if width not in widths:
        near = min(widths, key=lambda w: abs(w - width))
        raise ConfigError(f"width {width}: not in the nest of this model ({widths}); try {near}")
    return widths.index(width)


def largest_widths(config: ResolvedModel) -> list[int]:
    """Per block of a resolved config: the width at which its own elastic weights end."""
    return list(config.layer_widths or [config.nest[-1].width] * config.num_layers)


def block_rows(config: ResolvedModel) -> list[dict[int, NestRow]]:
    """Per block of a resolved config: a width that a plan asks for -> the row that the block runs, at most its last."""
    rows = {row.width: row for row in config.nest}
    return [{width: rows[min(width, own)] for width in rows} for own in largest_widths(config)]


def block_config(config: ResolvedModel, index: int) -> ResolvedModel:
    """A resolved config as block `index` of it sees it.

    Its nest ends at the block's own largest width, `widths[-1]`: columns of elastic weights, as `hidden_size` is of
    static ones. Heads, KV groups and rows of MLP and experts are those of that width. `layer_widths` stays.
    """
    if config.layer_widths is None:
        return config
    rows = [row for row in config.nest if row.width <= config.layer_widths[index]]
    own = rows[-1]
    return replace(
        config,
        nest=rows,
        widths=[row.width for row in rows],
        num_heads=own.kv_groups * (config.num_heads // config.num_kv_groups),
        num_kv_groups=own.kv_groups,
        ffn_size=own.ffn,
        expert_ffn_size=own.expert_ffn,
    )


def copy_rows(rows: list[NestRow]) -> list[NestRow]:
    return [replace(row) for row in rows]
