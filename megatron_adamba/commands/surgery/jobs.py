"""What the subcommands share: flags of an operation from one folder to another, and carrying it out."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.errors import ConfigError

if TYPE_CHECKING:
    from megatron_adamba.surgery.writing import Job

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_source(parser: CommandParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder to read")


def add_target(parser: CommandParser) -> None:
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; nothing is written over")


def job_command(
    summary: str,
    plan: Callable[[Namespace], Job],
    *options: Callable[[CommandParser], None],
    add_sources: Callable[[CommandParser], None] = add_source,
    examples: tuple[str, ...] = (),
) -> Command:
    """A command that reads one folder, or what `add_sources` asks for, and makes another, as `plan` checks and plans
    it. options: what adds the flags of its own."""

    def add_options(parser: CommandParser) -> None:
        add_sources(parser)
        add_target(parser)
        parser.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="of one file, e.g. 500MB")
        parser.add_argument("--dry-run", action="store_true", help="check, and show every tensor to be written")
        for add in options:
            add(parser)

    return Command(summary, add_options, lambda args: _carry_out(args, plan), examples=examples)


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


def _carry_out(args: Namespace, plan: Callable[[Namespace], Job]) -> int:
    max_shard_bytes = parse_size(args.max_shard_size)
    # torch reads it once: the kernel hands out memory in large pages, a tensor after the other at half the cost
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from megatron_adamba.commands.progress import progress_bar
    from megatron_adamba.surgery.sources import DTYPE_NAMES
    from megatron_adamba.surgery.writing import check_target, write_job

    check_target(args.target)
    job = plan(args)
    if args.dry_run:
        for tensor in job.tensors:
            print(f"{tensor.name}  {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}  <- {tensor.origin}")
    else:
        with progress_bar("writing", job.num_bytes, "bytes") as bar:
            write_job(job, args.target, max_shard_bytes, lambda name, num_bytes, seconds: bar.advance(num_bytes))
    made = "would hold" if args.dry_run else "holds"
    size = f"{len(job.tensors)} tensors, {job.num_bytes / 1e9:.3f} GB, in {job.num_shards(max_shard_bytes)} files"
    print(f"{args.target} {made} {size}; {job.promise}" + (f"; {job.note}" if job.note else ""))
    return 0
