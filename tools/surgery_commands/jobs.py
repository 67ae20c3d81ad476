"""What the subcommands share: flags of an operation from one folder to another, and carrying it out."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.errors import ConfigError

if TYPE_CHECKING:
    from megatron_adamba.surgery.writing import Job

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_job(commands, name: str, text: str, plan: Callable[[argparse.Namespace], Job]) -> argparse.ArgumentParser:
    """A subcommand that reads one folder and makes another, as `plan` checks and plans it."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("source", metavar="SRC", type=Path, help="folder to read")
    add_target(command, plan)
    return command


def add_target(command: argparse.ArgumentParser, plan: Callable[[argparse.Namespace], Job]) -> None:
    """The flags of what is written, and `run`, which carries the plan out."""
    command.add_argument("target", metavar="DST", type=Path, help="folder to make; nothing is written over")
    command.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="of one file, e.g. 500MB")
    command.add_argument("--dry-run", action="store_true", help="check, and show every tensor to be written")
    command.set_defaults(run=lambda args: _carry_out(args, plan))


def parse_size(text: str) -> int:
    """Bytes of `4GB`, `512MiB` or `1000`. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]) * UNITS[found[2].upper()] >= 1:
        raise ConfigError(f"--max-shard-size {text}: is no size; for example --max-shard-size 4GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse_whole_numbers(flag: str, text: str | None, example: str) -> list[int] | None:
    """`64,128` as a list. Raises ConfigError."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.strip("[] ").split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: must be whole numbers; for example {flag} {example}") from None


def _carry_out(args: argparse.Namespace, plan: Callable[[argparse.Namespace], Job]) -> int:
    max_shard_bytes = parse_size(args.max_shard_size)

    from megatron_adamba.surgery.sources import DTYPE_NAMES
    from megatron_adamba.surgery.writing import check_target, write_job

    check_target(args.target)
    job = plan(args)
    if args.dry_run:
        for tensor in job.tensors:
            print(f"{tensor.name}  {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}  <- {tensor.origin}")
    else:
        write_job(job, args.target, max_shard_bytes, _show_progress if sys.stderr.isatty() else lambda *_: None)
    made = "would hold" if args.dry_run else "holds"
    size = f"{len(job.tensors)} tensors, {job.num_bytes / 1e9:.3f} GB, in {job.num_shards(max_shard_bytes)} files"
    print(f"{args.target} {made} {size}; {job.promise}" + (f"; {job.note}" if job.note else ""))
    return 0


def _show_progress(name: str, num_bytes: int, seconds: float) -> None:
    rate = f"{num_bytes / 1e6 / seconds:9.1f} MB/s" if seconds > 0 else ""
    print(f"{name:48} {num_bytes / 1e6:10.1f} MB {rate}", file=sys.stderr)
