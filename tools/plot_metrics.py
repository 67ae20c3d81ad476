"""Draw the curves of a run from its metrics.jsonl.

python tools/plot_metrics.py --metrics runs/quickstart/metrics.jsonl --output runs/quickstart/curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script
from megatron_adamba.errors import DataError


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", required=True, help="metrics.jsonl of a run")
    parser.add_argument("--output", required=True, help="picture to write")
    args = parser.parse_args(words)

    from megatron_adamba.evaluation.pictures import draw_curves
    from megatron_adamba.training.metrics import read_metrics

    path = Path(args.metrics)
    if not path.is_file():
        raise DataError(f"--metrics {path}: no such file; a run leaves one at RUN/metrics.jsonl")
    records = read_metrics(path)
    if not records:
        raise DataError(f"--metrics {path}: holds no records yet; let the run take --logging.interval steps")
    draw_curves(records, Path(args.output))
    print(f"{len(records)} records drawn into {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
