"""checkpoint diff: are two the same?"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.checkpoint.described import counted, described, reworded
from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.errors import ConfigError

DETAILS = """Exits with 1 where they differ. Names the first tensor that differs, weights first, in
the model's order. Where one of the two is canonical only weights are compared."""


def add_options(parser: CommandParser) -> None:
    parser.add_argument("first", metavar="A", help="a checkpoint of any kind")
    parser.add_argument("second", metavar="B", help="another one")
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer state out")
    parser.add_argument("--all", action="store_true", help="every tensor that differs, not the first alone")
    parser.add_argument("--tolerance", type=float, help="values up to X apart count as equal")


def run(args: Namespace) -> int:
    from megatron_adamba.checkpoint.diff import differences
    from megatron_adamba.checkpoint.offline import CANONICAL, TRAINING, open_checkpoint
    from megatron_adamba.checkpoint.training import verify_files

    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise ConfigError(f"--tolerance {args.tolerance}: must be 0 or more, for example --tolerance 1e-6")
    first, second = open_checkpoint(Path(args.first)), open_checkpoint(Path(args.second))
    for checkpoint in (first, second):
        if checkpoint.kind == TRAINING:
            verify_files(checkpoint.folder)
    canonical = [checkpoint.folder for checkpoint in (first, second) if checkpoint.kind == CANONICAL]
    if len(canonical) == 1 and not args.weights_only:
        print(f"comparing weights only: {canonical[0]} is canonical and holds nothing else")
    found = 0
    weights_only = args.weights_only or bool(canonical)
    for difference in differences(first, second, weights_only, args.tolerance):
        found += 1
        print(f"{difference.name}: {difference.how}")
        if not args.all:
            return 1
    if found:
        print(f"{counted(found, 'tensor')} differ{'s' * (found == 1)}")
        return 1
    within = "" if args.tolerance is None else f" within {args.tolerance:g}"
    print(f"identical{within}: {described(first.weights.values() if weights_only else first.infos.values())}")
    return 0


COMMAND = Command(
    "compare two checkpoints of any kind, bit for bit",
    add_options,
    run,
    DETAILS,
    ("adamba checkpoint diff RUN/checkpoints RUN/model",),
    reworded,
)
