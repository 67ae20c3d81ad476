"""extract: one width of a nested model, or a width for each block and an exit, as a model of its own."""

from __future__ import annotations

import argparse

from surgery_commands.jobs import add_job, parse_whole_numbers


def add(commands) -> None:
    text = "what runs at one width, or at one for each block up to an exit, as a smaller model"
    add_plan_flags(add_job(commands, "extract", text, _plan))


def add_plan_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--width", type=int, help="of every block, one of the nest's")
    command.add_argument("--widths", metavar="LIST", help="one for each block that runs, e.g. 512,512,1024")
    command.add_argument("--exit-layer", type=int, metavar="N", help="blocks that run; all by default")


def plan_flags(args: argparse.Namespace) -> tuple[int | None, list[int] | None, int | None]:
    """Raises ConfigError."""
    return args.width, parse_whole_numbers("--widths", args.widths, "512,512,1024"), args.exit_layer


def _plan(args: argparse.Namespace):
    width, widths, exit_layer = plan_flags(args)

    from megatron_adamba.surgery.extract import extract

    return extract(args.source, width, widths, exit_layer)
