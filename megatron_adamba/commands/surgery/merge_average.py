"""merge-average: the mean of several checkpoints of one model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.surgery.jobs import job_command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.errors import ConfigError


def add_sources(parser: CommandParser) -> None:
    parser.add_argument("sources", metavar="SRC", nargs="+", type=Path, help="folders to read, two or more")


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--weights", metavar="LIST", help="one a source, e.g. 0.5,0.3,0.2; alike by default")


def _plan(args: Namespace):
    weights = None if args.weights is None else _numbers(args.weights, len(args.sources))

    from megatron_adamba.surgery.merge_average import merge_average

    return merge_average(args.sources, weights)


def _numbers(text: str, count: int) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        example = ",".join(["1"] * count)
        raise ConfigError(f"--weights {text}: must be numbers; for example --weights {example}") from None


COMMAND = job_command(
    "the mean of several checkpoints of one model",
    _plan,
    add_options,
    add_sources=add_sources,
    examples=("adamba surgery merge-average runs/a/model runs/b/model runs/mean --weights 0.7,0.3",),
)
