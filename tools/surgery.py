"""Operations on checkpoints that keep what the model computes; each streams from one folder into a new one.

python tools/surgery.py import gpt-oss gpt-oss-20b/original runs/gpt-oss-20b
python tools/surgery.py graft runs/gpt-oss-20b runs/hybrid --pattern "(EEM)x12" --mamba-num-heads 256
python tools/surgery.py export hf runs/gpt-oss-20b runs/gpt-oss-20b-hf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from surgery_commands import graft, published

from megatron_adamba.config.script import run_script

COMMANDS = (published, graft)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="operation", required=True)
    for module in COMMANDS:
        module.add(commands)
    args = parser.parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    run_script(main)
