"""Operations on checkpoints that keep what the model computes; each streams from one folder into a new one.

python tools/surgery.py import gpt-oss gpt-oss-20b/original runs/gpt-oss-20b
python tools/surgery.py graft runs/gpt-oss-20b runs/hybrid --pattern "(EEM)x12" --mamba-num-heads 256
python tools/surgery.py extract runs/hybrid runs/hybrid-720 --width 720
python tools/surgery.py merge-average runs/a/model runs/b/model runs/mean --weights 0.7,0.3
python tools/surgery.py compare runs/hybrid runs/hybrid-720 --width 720 --data data/validation
python tools/surgery.py export hf runs/gpt-oss-20b runs/gpt-oss-20b-hf
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from surgery_commands import compare, expand, extract, graft, merge_average, published, reorder

from megatron_adamba.config.script import run_script

COMMANDS = (published, graft, expand, extract, merge_average, compare, reorder)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="operation", required=True)
    for module in COMMANDS:
        module.add(commands)
    # torch reads it once: the kernel hands out memory in large pages, a tensor after the other at half the cost
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    args = parser.parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    run_script(main)
