"""Print what combines with what, as README shows it.

python tools/support_matrix.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(words)

    from megatron_adamba.blueprint.support import support_table

    print(support_table())
    return 0


if __name__ == "__main__":
    run_script(main)
