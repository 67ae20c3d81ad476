"""merge-average: the mean of several checkpoints of one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_adamba.errors import ConfigError
from surgery_commands.jobs import add_target


def add(commands) -> None:
    text = "the mean of several checkpoints of one model"
    command = commands.add_parser("merge-average", help=text, description=text)
    command.add_argument("sources", metavar="SRC", nargs="+", type=Path, help="folders to read, two or more")
    add_target(command, _plan)
    command.add_argument("--weights", metavar="LIST", help="one a source, e.g. 0.5,0.3,0.2; alike by default")


def _plan(args: argparse.Namespace):
    weights = None if args.weights is None else _numbers(args.weights, len(args.sources))

    from megatron_adamba.surgery.merge_average import merge_average

    return merge_average(args.sources, weights)


def _numbers(text: str, count: int) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        example = ",".join(["1"] * count)
        raise ConfigError(f"--weights {text}: must be numbers; for example --weights {example}") from None
