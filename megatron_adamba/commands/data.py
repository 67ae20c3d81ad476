"""data: tokenizes a corpus into Megatron's indexed datasets."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write
from megatron_adamba.config.script import stopped_by_signals
from megatron_adamba.data.corpus import corpus_bytes
from megatron_adamba.data.preprocess import PreprocessOptions, preprocess
from megatron_adamba.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help="folder, file of text or JSON, or python-stdlib")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes | FILE.model | tokenizer.json | FILE.tiktoken | tiktoken:NAME | folder",
    )
    parser.add_argument("--eod-token", help="end-of-document token by name, if it is not one of the usual ones")
    parser.add_argument("--split-pattern", help="of a FILE.tiktoken: encoding it was made with, or regular expression")
    parser.add_argument("--output", required=True, help="prefix of the dataset; with --split a folder")
    parser.add_argument("--split", action="store_true", help="write OUTPUT/train and OUTPUT/validation")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="share of documents held out")
    parser.add_argument("--json-key", default="text", help="key of the text in JSON")
    parser.add_argument("--workers", type=int, default=1, help="processes; the files do not depend on it")
    parser.add_argument("--json", metavar="FILE", help="write the printed table as JSON too")


def run(args: Namespace) -> int:
    from rich.console import Console

    from megatron_adamba.commands.progress import on_terminal, progress_bar

    if args.json is not None:
        file_to_write("--json", args.json, "report.json")
    options = PreprocessOptions(
        inputs=tuple(args.input),
        output=args.output,
        tokenizer=args.tokenizer,
        eod_token=args.eod_token,
        split_pattern=args.split_pattern,
        split=args.split,
        validation_fraction=args.validation_fraction,
        json_key=args.json_key,
        workers=args.workers,
    )
    started = time.perf_counter()
    total = corpus_bytes(args.input) if on_terminal() else None
    with progress_bar("tokenizing", total, "bytes") as bar, stopped_by_signals():
        metas, left_out = preprocess(options, bar.advance)
    done = sum(meta.num_bytes for meta in metas.values())
    seconds = time.perf_counter() - started
    report = {
        "datasets": {prefix: asdict(meta) for prefix, meta in metas.items()},
        "skipped": dict(sorted(left_out.items())),
        "skipped_names": left_out.names,
        "seconds": round(seconds, 3),
        "megabytes_per_second": round(done / 1e6 / seconds, 3),
    }
    if args.json:
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    print_report(Console(), report, left_out.described())
    return 0


def print_report(console: Console, report: dict, left_out: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("dataset", overflow="fold")
    for name in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for prefix, meta in report["datasets"].items():
        ratio = meta["num_bytes"] / meta["num_tokens"]
        counts = (f"{meta[name]:,}" for name in ("num_documents", "num_tokens", "num_bytes"))
        table.add_row(Text(prefix), *counts, f"{ratio:.3f}")
    console.print(table)
    text = f"left out: {left_out or 'nothing'}; {report['seconds']:.1f} s, {report['megabytes_per_second']:.1f} MB/s"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


COMMAND = Command(
    "tokenize texts into Megatron's indexed datasets",
    add_options,
    run,
    examples=("adamba data --input python-stdlib --tokenizer tokenizer.model --output data --split",),
)
