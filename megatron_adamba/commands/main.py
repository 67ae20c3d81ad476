"""`adamba`: one command for everything. Scripts of a clone (`pretrain_adamba.py`, `tools/*.py`) are doors to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_adamba import __version__
from megatron_adamba.commands.command import Group, find
from megatron_adamba.config.script import run_script

_ROOM = "megatron_adamba.commands"
COMMANDS = Group(
    "elastic hybrid language models: train, evaluate, run, grow",
    {
        "train": f"{_ROOM}.train",
        "evaluate": f"{_ROOM}.evaluate",
        "generate": f"{_ROOM}.generate",
        "chat": f"{_ROOM}.chat",
        "serve": f"{_ROOM}.serve",
        "data": f"{_ROOM}.data",
        "tokenizer": f"{_ROOM}.tokenizer",
        "surgery": f"{_ROOM}.surgery.group",
        "checkpoint": f"{_ROOM}.checkpoint.group",
        "plot": f"{_ROOM}.plot",
        "compare-evaluations": f"{_ROOM}.compare_evaluations",
        "compare-with-xz": f"{_ROOM}.compare_with_xz",
        "evaluate-tasks": f"{_ROOM}.evaluate_tasks",
        "benchmark": f"{_ROOM}.benchmark",
        "support-matrix": f"{_ROOM}.support_matrix",
    },
    examples=(
        "adamba train --preset tiny-hybrid --data.train data/train --logging.run_dir runs/first",
        "adamba evaluate --model runs/first/model --data data/validation",
        'adamba generate --model runs/first/model --mode whisper --prompt "def "',
    ),
)


def main(words: Sequence[str] | None = None, leave: Callable[[int], NoReturn] | None = None) -> NoReturn:
    """Runs the command line's words, or these, and exits: by `leave`, or as the command wants it."""
    words = list(sys.argv[1:] if words is None else words)
    if words == ["--version"]:
        print(__version__)
        sys.exit(0)
    # DeepSpeed's launcher puts its own flag in front, before the name of the command
    given = [words.pop(0)] if words and words[0].startswith("--local_rank=") else []
    entry, prog, rest = find(COMMANDS, words, "adamba")
    run_script(lambda: entry.main([*given, *rest], prog), entry.reworded, leave or entry.leave)


def door(*names: str) -> NoReturn:
    """What a script of a clone calls: the command of these names, with the script's own words."""
    main([*names, *sys.argv[1:]])
