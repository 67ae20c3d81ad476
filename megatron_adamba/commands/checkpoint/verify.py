"""checkpoint verify: is it whole?"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.checkpoint.described import described, reworded, where
from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser

DETAILS = """Prints OK, or the first damage and exits with 5.

Training: sizes and checksums of files.json; every tensor covered once by its chunks,
which lie inside their files and can be read; the weights are those of the config's
model. Canonical: index, headers and file sizes agree; the weights are those of the
config's model, and finite."""


def add_options(parser: CommandParser) -> None:
    parser.add_argument("path", metavar="PATH", help="canonical folder, step-NNNNNNNN, or RUN/checkpoints")


def run(args: Namespace) -> int:
    from megatron_adamba.checkpoint.canonical import read_checksums
    from megatron_adamba.checkpoint.offline import CANONICAL
    from megatron_adamba.checkpoint.verify import verify

    checkpoint = verify(Path(args.path))
    bare = checkpoint.kind == CANONICAL and not read_checksums(checkpoint.folder)
    note = "; it has no checksums: values are known to be finite, not to be unchanged" if bare else ""
    held = described(checkpoint.infos.values())
    print(f"OK: {checkpoint.folder}: {checkpoint.kind}{where(checkpoint)}, {held}{note}")
    return 0


COMMAND = Command(
    "check that a checkpoint is whole",
    add_options,
    run,
    DETAILS,
    ("adamba checkpoint verify RUN/model",),
    reworded,
)
