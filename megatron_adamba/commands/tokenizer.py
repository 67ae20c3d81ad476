"""tokenizer: trains a lossless sentencepiece tokenizer on a corpus."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.commands.progress import Bar, on_terminal, progress_bar
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import file_to_write, in_range
from megatron_adamba.data.corpus import Read, corpus_bytes
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import split_documents
from megatron_adamba.data.sentencepiece_training import train_sentencepiece
from megatron_adamba.data.tokenizer_options import MOST_IDS
from megatron_adamba.errors import ConfigError
from megatron_adamba.files import write_atomically


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help="folder, file of text or JSON, or python-stdlib")
    parser.add_argument("--output", required=True, help="file to write, ending in .model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces in all, 256 bytes among them")
    parser.add_argument("--max-megabytes", type=float, default=32, help="of a larger corpus a sample is used")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="share held out, as in preprocessing")
    parser.add_argument("--json-key", default="text", help="key of the text in JSON")
    parser.add_argument("--json", metavar="FILE", help="write the printed table as JSON too")


def run(args: Namespace) -> int:
    check(args)
    started, left_out = time.perf_counter(), LeftOut()
    total = corpus_bytes(args.input) if on_terminal() else None
    with progress_bar("reading", total, "bytes") as bar:
        training = _then_training(documents(args, False, left_out, bar.advance), bar)
        tokenizer = train_sentencepiece(training, args.vocab_size, args.output, round(args.max_megabytes * 1e6))
    seconds = time.perf_counter() - started
    num_bytes = num_tokens = 0
    for text in documents(args, True, LeftOut()):
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text))
    report = {
        "tokenizer": str(args.output),
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "left_out": left_out.described() or "nothing",
        "seconds": round(seconds, 3),
        "held_out_bytes": num_bytes,
        "held_out_bytes_per_token": round(num_bytes / num_tokens, 4) if num_tokens else None,
    }
    if args.json:
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    for name, value in report.items():
        print(f"{name:26} {value}")
    return 0


def check(args: Namespace) -> None:
    """Raises ConfigError for a value that cannot work."""
    if not 0 <= args.validation_fraction < 1:
        raise ConfigError(
            f"--validation-fraction {args.validation_fraction}: a share below 1 is needed, or 0 for none, e.g. 0.05"
        )
    if not 0 < args.max_megabytes < float("inf"):
        raise ConfigError(f"--max-megabytes {args.max_megabytes}: must be above 0 and finite, e.g. 32")
    in_range("--vocab-size", args.vocab_size, 258, MOST_IDS - 1)
    file_to_write("--output", args.output, "tokenizer.model")
    if args.json is not None:
        file_to_write("--json", args.json, "report.json")


def _then_training(texts: Iterator[str], bar: Bar) -> Iterator[str]:
    yield from texts
    bar.turn_to("training")


def documents(args: Namespace, held_out: bool, left_out: LeftOut, read: Read = lambda num_bytes: None) -> Iterator[str]:
    for text, apart in split_documents(args.input, args.json_key, args.validation_fraction, left_out, read):
        if apart == held_out:
            yield text


COMMAND = Command(
    "train a lossless sentencepiece tokenizer (BPE with byte fallback)",
    add_options,
    run,
    examples=("adamba tokenizer --input python-stdlib --vocab-size 4096 --output tokenizer.model",),
)
