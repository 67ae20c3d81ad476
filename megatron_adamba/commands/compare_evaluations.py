"""compare-evaluations: losses at every width, their mean below the widest, and losses at every exit, side by side."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write
from megatron_adamba.evaluation.report import read_rows
from megatron_adamba.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

MOST_COLUMNS = 5


def add_options(parser: CommandParser) -> None:
    parser.add_argument("evaluations", nargs="+", metavar="FILE", help="eval.json that adamba evaluate --json wrote")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: Namespace) -> int:
    file_to_write("--json", args.json, "report.json")

    from rich.console import Console

    losses = {name: read_losses(path) for name, path in named([Path(word) for word in args.evaluations]).items()}
    print_losses(Console(), losses)
    if args.json:
        write_atomically(Path(args.json), (json.dumps(losses, indent=1) + "\n").encode())
    return 0


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """The files by what tells them apart: their names, with as many folders in front as that takes."""
    bare = [path.with_suffix("") for path in paths]
    for count in range(1, max(len(path.parts) for path in bare) + 1):
        names = ["/".join(path.parts[-count:]) for path in bare]
        if len(set(names)) == len(set(bare)):
            break
    return dict(zip(names, paths))


def print_losses(console: Console, losses: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each plan, a column for each evaluation; many evaluations take several tables."""
    from rich.table import Table
    from rich.text import Text

    plans = list(dict.fromkeys(plan for found in losses.values() for plan in found))
    for start in range(0, len(losses), MOST_COLUMNS):
        chosen = list(losses)[start : start + MOST_COLUMNS]
        table = Table(title="nats per token")
        table.add_column("", no_wrap=True)
        for name in chosen:
            table.add_column(Text(name), justify="right", overflow="fold")
        for plan in plans:
            table.add_row(plan, *(f"{losses[name][plan]:.4f}" if plan in losses[name] else "" for name in chosen))
        console.print(table)


def read_losses(path: Path) -> dict[str, float]:
    """By column. Raises DataError where the file is no evaluation."""
    rows = read_rows(path)
    widths = {row.width: row.nats_per_token for row in rows if row.exit_layer is None}
    exits = {row.exit_layer: row.nats_per_token for row in rows if row.exit_layer is not None}
    losses = {f"width {width}": loss for width, loss in widths.items()}
    narrow = [loss for width, loss in widths.items() if width < max(widths)]
    if narrow:
        losses["mean below"] = sum(narrow) / len(narrow)
    return losses | {f"{layer} blocks": loss for layer, loss in exits.items()}


COMMAND = Command(
    "several evaluations side by side",
    add_options,
    run,
    details="Losses at every width, their mean below the widest, and losses at every exit.",
    examples=("adamba compare-evaluations runs/a/eval.json runs/b/eval.json",),
)
