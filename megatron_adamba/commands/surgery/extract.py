"""extract: one width of a nested model, or a width for each block and an exit, as a model of its own."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.surgery.jobs import job_command, parse_whole_numbers
from megatron_adamba.config.parser import CommandParser


def add_plan_flags(parser: CommandParser) -> None:
    parser.add_argument("--width", type=int, help="of every block, one of the nest's")
    parser.add_argument("--widths", metavar="LIST", help="one for each block that runs, e.g. 512,512,1024")
    parser.add_argument("--exit-layer", type=int, help="blocks that run; all by default")


def plan_flags(args: Namespace) -> tuple[int | None, list[int] | None, int | None]:
    """Raises ConfigError."""
    return args.width, parse_whole_numbers("--widths", args.widths, "512,512,1024"), args.exit_layer


def _add_flags(parser: CommandParser) -> None:
    add_plan_flags(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not hold tensors against their checksums")


def _plan(args: Namespace):
    width, widths, exit_layer = plan_flags(args)

    from megatron_adamba.surgery.extract import extract

    return extract(args.source, width, widths, exit_layer, verify=not args.no_verify)


COMMAND = job_command(
    "what runs at one width, or at one for each block up to an exit, as a smaller model",
    _plan,
    _add_flags,
    examples=("adamba surgery extract runs/hybrid runs/hybrid-720 --width 720",),
)
