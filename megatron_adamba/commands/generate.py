"""generate: text from a trained model, at one of its widths or with widths and exits that it chooses."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.commands.generation_options import (
    add_mode_options,
    add_model_options,
    add_sampling_options,
    chosen_mode,
    chosen_sampling,
)
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import count, file_to_write


def add_options(parser: CommandParser) -> None:
    add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to go on from")
    source.add_argument("--file", type=Path, help="prompts, one a line, run side by side")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of --file at a time")
    parser.add_argument("--output", metavar="FILE", help="write the text there too; for --file one JSON object a line")
    add_mode_options(parser)
    add_sampling_options(parser)


def run(args: Namespace) -> int:
    from megatron_adamba.commands.prompts import generate_file, generate_prompt
    from megatron_adamba.inference.load import load_model

    count("--batch-size", args.batch_size, 4096)
    file_to_write("--output", args.output, "sample.txt")
    sampling, mode = chosen_sampling(args), chosen_mode(args)
    loaded = load_model(args.model, args.dtype, verify=not args.no_verify)
    generate = generate_file if args.file else generate_prompt
    generate(loaded, args, mode, sampling)
    return 0


COMMAND = Command(
    "text from a model, at a width of yours or at its own choice",
    add_options,
    run,
    examples=(
        'adamba generate --model runs/quickstart/model --mode think --prompt "def "',
        'adamba generate --model runs/quickstart/model --mode adaptive --stats --prompt "def "',
        "adamba generate --model runs/quickstart/model --file prompts.txt --output texts.jsonl",
    ),
)
