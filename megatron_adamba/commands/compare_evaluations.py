"""compare-evaluations: losses at every width, their mean below the widest, and losses at every exit, side by side."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write
from megatron_adamba.evaluation.report import read_rows
from megatron_adamba.files import write_atomically


def add_options(parser: CommandParser) -> None:
    parser.add_argument("evaluations", nargs="+", metavar="FILE", help="eval.json that adamba evaluate --json wrote")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: Namespace) -> int:
    file_to_write("--json", args.json, "report.json")

    from rich.console import Console
    from rich.table import Table

    losses = {Path(name).with_suffix("").name: read_losses(Path(name)) for name in args.evaluations}
    columns = list(dict.fromkeys(column for row in losses.values() for column in row))
    table = Table(title="nats per token")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in losses.items():
        table.add_row(name, *(f"{row[column]:.4f}" if column in row else "" for column in columns))
    Console(width=40 + 12 * len(columns)).print(table)
    if args.json:
        write_atomically(Path(args.json), (json.dumps(losses, indent=1) + "\n").encode())
    return 0


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
