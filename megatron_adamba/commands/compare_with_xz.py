"""compare-with-xz: a model's bits per byte against those of `xz -9e` on the same held-out documents, all in one
stream."""

from __future__ import annotations

import json
import lzma
from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write
from megatron_adamba.errors import DataError
from megatron_adamba.files import write_atomically

SLACK = 0.01
"""bits per byte by which a wider width may be worse than a narrower one"""


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--eval", required=True, help="eval.json that adamba evaluate --json wrote")
    parser.add_argument("--data", required=True, help="prefix of the dataset that was evaluated")
    parser.add_argument("--tokenizer", required=True, help="tokenizer that made it")
    parser.add_argument("--eod-token", help="as given when it was made")
    parser.add_argument("--split-pattern", help="as given when it was made")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the model wins")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON too")


def run(args: Namespace) -> int:
    from megatron_adamba.data.blend import open_dataset
    from megatron_adamba.data.tokenizer import load_tokenizer
    from megatron_adamba.evaluation.report import read_rows

    file_to_write("--json", args.json, "report.json")
    rows = read_rows(Path(args.eval), "--eval ")
    tokenizer = load_tokenizer(args.tokenizer, args.eod_token, args.split_pattern, network=True)
    indexed = open_dataset(args.data, tokenizer, "--data", "--tokenizer")
    documents = [tokenizer.decode(indexed.document(i).tolist()) for i in range(indexed.num_documents)]
    content = "".join(documents).encode()
    if rows[-1].bytes != len(content):
        raise DataError(f"--eval {args.eval}: scored {rows[-1].bytes} bytes, {args.data} holds {len(content)}")
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    xz = 8 * len(packed) / len(content)
    bits = [row.bits_per_byte for row in rows if row.bits_per_byte is not None]
    if len(bits) < len(rows):
        raise DataError(f"--eval {args.eval}: has no bits per byte; evaluate a dataset whose sidecars are there")
    in_order = all(wide <= narrow + SLACK for i, narrow in enumerate(bits) for wide in bits[i + 1 :])
    print(f"{len(content):,} held-out bytes: xz -9e {xz:.4f} bits per byte, the model {bits[-1]:.4f} at full width")
    print("no wider width is worse than a narrower one" if in_order else "widths are out of order: " + str(bits))
    if args.json:
        report = {"bytes": len(content), "xz": xz, "model": bits[-1], "widths_in_order": in_order}
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    return int(args.check and not (bits[-1] < xz and in_order))


COMMAND = Command(
    "hold a model's bits per byte against xz -9e on the same text",
    add_options,
    run,
    examples=(
        "adamba compare-with-xz --eval runs/quickstart/eval.json --data runs/quickstart/data/validation "
        "--tokenizer runs/quickstart/data/tokenizer.model",
    ),
)
