"""Measure this project beside its peers: the same weights, dtype and threads, outputs compared before anything counts.

python tools/benchmark.py nested|train|blocks|mixer|moe|tp|pipeline|decode|surgery [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script

SUBCOMMANDS = {
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


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="subcommand", required=True)
    for name, text in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        subparser.add_argument("--json", metavar="FILE", help="also write the rows there")
        subparser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
        subparser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all of the machine's")
        if name == "surgery":
            subparser.add_argument("--gigabytes", type=float, metavar="N", help="of the checkpoint; 8 by default")
            subparser.add_argument("--folder", type=Path, metavar="DIR", help="scratch space; runs/ by default")
    args = parser.parse_args(words)

    import torch
    from benchmarks.common import print_rows, write_rows

    torch.set_num_threads(args.threads)
    options = {name: getattr(args, name) for name in ("gigabytes", "folder") if name in args}
    rows = importlib.import_module(f"benchmarks.{args.subcommand}").measure(args.quick, **options)
    print_rows(f"{SUBCOMMANDS[args.subcommand]} ({args.threads} threads)", rows)
    if args.json:
        write_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    run_script(main)
