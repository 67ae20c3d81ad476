"""chat: turns at the terminal, each with the text so far in the model's caches."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.command import Command
from megatron_adamba.commands.generation_options import (
    add_mode_options,
    add_model_options,
    add_sampling_options,
    chosen_mode,
    chosen_sampling,
)
from megatron_adamba.config.parser import CommandParser


def add_options(parser: CommandParser) -> None:
    add_model_options(parser)
    add_mode_options(parser)
    add_sampling_options(parser)


def run(args: Namespace) -> int:
    from megatron_adamba.commands.prompts import chat
    from megatron_adamba.inference.load import load_model

    sampling, mode = chosen_sampling(args), chosen_mode(args)
    chat(load_model(args.model, args.dtype, verify=not args.no_verify), args, mode, sampling)
    return 0


COMMAND = Command(
    "turns at the terminal; an empty one ends",
    add_options,
    run,
    details="A base model does not answer: it goes on with the text, yours and its own.",
    examples=("adamba chat --model runs/quickstart/model --mode adaptive --stats",),
)
