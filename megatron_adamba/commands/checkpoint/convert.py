"""checkpoint convert: training to canonical and back."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.commands.checkpoint.described import described, reworded
from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import count
from megatron_adamba.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    from megatron_adamba.checkpoint.offline import OpenCheckpoint

DETAILS = """To canonical: whole weights under their own names, in safetensors shards, with the
config and the run's tokenizer. Optimizer state stays behind.

To training: fp32 weights, no optimizer state, counters at 0. `adamba train --resume
DST` starts from it and reports the optimizer state as reset. --tp and --dp name the
layout whose ranks' files are written; a run of any layout reads them. Rank dp_rank *
tp + tp_rank writes __RANK_0.distcp: its tensor-parallel shard of every tensor, of that
the dp_rank-th of dp equal runs of elements (as ZeRO 3 cuts parameters); what tensor
parallelism leaves whole goes to tp_rank 0 alone."""

_MOST_RANKS = {"tp": 1024, "dp": 4096}
"""each of their products is a file"""


def add_options(parser: CommandParser) -> None:
    parser.add_argument("source", metavar="SRC", help="training or canonical; its kind decides the direction")
    parser.add_argument("target", metavar="DST", help="folder to write; must not be there")
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks to write for (to training only; 1)")
    parser.add_argument("--dp", type=int, help="data-parallel ranks to write for (to training only; 1)")
    parser.add_argument("--force", action="store_true", help="replace DST where it is a checkpoint")


def run(args: Namespace) -> int:
    from megatron_adamba.checkpoint.offline import TRAINING, open_checkpoint, to_canonical, to_training

    for flag, most in _MOST_RANKS.items():
        if getattr(args, flag) is not None:
            count(f"--{flag}", getattr(args, flag), most)
    target = Path(os.path.abspath(args.target))
    check_target(target, args.target, args.force)
    source = open_checkpoint(Path(args.source))
    folder = source.folder.resolve()
    if target.resolve() in (folder, *folder.parents):
        raise ConfigError(f"{args.target}: holds the checkpoint to convert; give another folder")
    if source.kind == TRAINING:
        if args.tp is not None or args.dp is not None:
            raise ConfigError(f"--tp, --dp: {args.source} becomes canonical, whole tensors without a layout; leave out")
        files, note = tokenizer_files(source)
        to_canonical(source, target, files)
        print(f"{args.target}: canonical, {described(source.weights.values())}{note}")
        return 0
    tp, dp = args.tp or 1, args.dp or 1
    to_training(source, target, tp, dp)
    print(
        f"{args.target}: training checkpoint at step 0, {described(source.weights.values())}, for tp {tp} x dp {dp}; "
        f"train on with adamba train --resume {args.target}"
    )
    return 0


def check_target(target: Path, name: str, force: bool) -> None:
    """Raises ConfigError where the target is there and may not be replaced."""
    from megatron_adamba.checkpoint.offline import kind_of

    if not os.path.lexists(target):
        return
    if not force:
        raise ConfigError(f"{name}: is there already; give another folder, or --force to replace it")
    if target.is_symlink() or not target.is_dir() or (kind_of(target) is None and any(target.iterdir())):
        raise ConfigError(f"{name}: is no checkpoint, and --force replaces nothing else; give another folder")


def tokenizer_files(source: OpenCheckpoint) -> tuple[dict[str, bytes] | None, str]:
    """Files of the run's tokenizer where it is still what it was, or none and a note; None: the checkpoint has them.

    A checkpoint may come from anywhere: a path in it is not reason enough to copy a file.
    """
    from megatron_adamba.checkpoint.carried import carried_files
    from megatron_adamba.data.tokenizer import load_tokenizer

    data = source.config.get("data")
    said = data if isinstance(data, dict) else {}
    name, *more = (said.get(key) for key in ("tokenizer", "eod_token", "split_pattern"))
    if carried_files(source.folder):
        return None, ""
    if not name or not all(value is None or isinstance(value, str) for value in (name, *more)):
        return {}, ""
    try:
        tokenizer = load_tokenizer(name, *more)
        if tokenizer.hash == source.config.get("tokenizer_hash"):
            return tokenizer.carried(), ""
        why = "is not the run's"
    except TokenizerError as error:
        why = "is not a file here" if "no such file" in str(error) else "cannot be read"
    return {}, f"; its tokenizer {name} {why}: copy the right one in"


COMMAND = Command(
    "make a training checkpoint canonical, or a canonical one a training checkpoint",
    add_options,
    run,
    DETAILS,
    (
        "adamba checkpoint convert RUN/checkpoints MODEL",
        "adamba checkpoint convert RUN/model START --tp 2 --dp 4",
    ),
    reworded,
)
