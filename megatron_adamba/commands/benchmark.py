"""benchmark: this project beside its peers, with the same weights, dtype and threads; outputs are compared before
anything counts."""

from __future__ import annotations

import importlib
import os
from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.command import Command, Group
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import count

BENCHMARKS = {
    "nested": "an elastic block inside the engine, beside a dense block built at that width and a masked one",
    "train": "a model configured like nanochat, beside transformers' NanoChat",
    "blocks": "models of T blocks and of M blocks at growing lengths, beside each other",
    "mixer": "the Mamba-2 mixer, beside transformers' on its torch path",
    "moe": "a mixture-of-experts layer, beside transformers' experts and DeepSpeed's MoE",
    "tp": "layers over two ranks, their units dealt out in turn, beside the same layers split into halves",
    "pipeline": "pipelines of two stages as they run, of four and eight replayed, cut by cost and into equal counts",
    "decode": "the modes of one model and its own choices, beside transformers generating; T and M at long contexts",
    "surgery": "operations on a synthetic checkpoint, beside cp plus fsync of the files that they write",
}


def measured(name: str) -> Command:
    """The command of one benchmark."""

    def add_options(parser: CommandParser) -> None:
        parser.add_argument("--json", metavar="FILE", help="also write the rows there")
        parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
        parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all of the machine's by default")
        if name == "surgery":
            parser.add_argument("--gigabytes", type=float, help="of the checkpoint; 8 by default")
            parser.add_argument("--folder", type=Path, help="scratch space; runs/ by default")

    return Command(BENCHMARKS[name], add_options, lambda args: run(name, args))


def run(name: str, args: Namespace) -> int:
    count("--threads", args.threads, 4096)

    import torch

    from megatron_adamba.commands.benchmarks.common import print_rows, write_rows

    torch.set_num_threads(args.threads)
    options = {option: getattr(args, option) for option in ("gigabytes", "folder") if option in args}
    rows = importlib.import_module(f"megatron_adamba.commands.benchmarks.{name}").measure(args.quick, **options)
    print_rows(f"{BENCHMARKS[name]} ({args.threads} threads)", rows)
    if args.json:
        write_rows(args.json, rows)
    return 0


COMMAND = Group(
    "this project beside its peers, measured",
    {name: measured(name) for name in BENCHMARKS},
    details="The same weights, dtype and threads; outputs are compared before anything counts.",
    examples=("adamba benchmark nested --quick",),
)
