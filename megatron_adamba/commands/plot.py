"""plot: the curves of a run, or the losses of several runs of which each goes on with the last."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write
from megatron_adamba.errors import DataError


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--metrics", required=True, nargs="+", help="metrics.jsonl of a run, or of several in order")
    parser.add_argument("--output", required=True, help="picture to write")


def run(args: Namespace) -> int:
    file_to_write("--output", args.output, "curves.png")

    from megatron_adamba.evaluation.pictures import draw_curves, draw_road

    runs = [(Path(name).parent.name or name, _read(Path(name))) for name in args.metrics]
    if len(runs) == 1:
        draw_curves(runs[0][1], Path(args.output))
    else:
        draw_road(runs, Path(args.output))
    print(f"{sum(len(records) for _, records in runs)} records drawn into {args.output}")
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    from megatron_adamba.evaluation.report import checked_metrics
    from megatron_adamba.training.metrics import read_metrics

    if not path.is_file():
        raise DataError(f"--metrics {path}: no such file; a run leaves one at RUN/metrics.jsonl")
    try:
        records = checked_metrics(read_metrics(path), path)
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"--metrics {path}: is no metrics.jsonl ({type(error).__name__}); give a run's own") from None
    if not records:
        raise DataError(f"--metrics {path}: holds no records yet; the run writes one every logging.interval steps")
    return records


COMMAND = Command(
    "draw a run's curves, or the losses of several runs in a row",
    add_options,
    run,
    examples=(
        "adamba plot --metrics runs/quickstart/metrics.jsonl --output curves.png",
        "adamba plot --metrics runs/phase-1/metrics.jsonl runs/phase-2/metrics.jsonl --output road.png",
    ),
)
