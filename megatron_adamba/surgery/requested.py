"""The plan that a user's flags ask a model for."""

from __future__ import annotations

from pathlib import Path

from megatron_adamba.blueprint.nest import block_rows, largest_widths, nearest_width
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.errors import ConfigError


def requested_plan(
    config: ResolvedModel, folder: Path, width: int | None, widths: list[int] | None, exit_layer: int | None
) -> ElasticPlan:
    """What runs at --width W, or at --widths, one a block that runs or one a block, up to --exit-layer.

    config: resolved, of the model in `folder`. What is not given is everything; a block that ends at less than is asked
    for has what it has. Raises ConfigError.
    """
    depth = config.num_layers
    if width is not None and widths is not None:
        raise ConfigError(f"--width {width} and --widths {_listed(widths)}: give one of the two")
    if exit_layer is not None and not 1 <= exit_layer <= depth:
        raise ConfigError(
            f"--exit-layer {exit_layer}: {folder} has {depth} blocks; give 1 to {depth}, for example {depth}"
        )
    runs = depth if exit_layer is None else exit_layer
    own = largest_widths(config)
    if width is not None:
        _check_width("--width", width, config, folder)
        widths = [width] * depth
    elif widths is None:
        widths = own
    elif len(widths) not in (runs, depth):
        raise ConfigError(
            f"--widths {_listed(widths)}: lists {len(widths)} widths, {runs} blocks of {folder} run; "
            f"for example --widths {_listed(own[:runs])}"
        )
    else:
        for each in widths:
            _check_width(f"--widths {_listed(widths)}", each, config, folder)
        # blocks above the exit do not run, so theirs is any
        widths = [*widths, *own[len(widths) :]]
    rows = block_rows(config)
    return ElasticPlan(tuple(rows[index][each].width for index, each in enumerate(widths)), runs)


def _check_width(flag: str, width: int, config: ResolvedModel, folder: Path) -> None:
    known = [row.width for row in config.nest]
    if width not in known:
        flag = f"{flag} {width}" if flag == "--width" else f"{flag}: {width}"
        raise ConfigError(f"{flag}: not in the nest of {folder} ({known}); try {nearest_width(known, width)}")


def _listed(widths: list[int]) -> str:
    return ",".join(map(str, widths))
