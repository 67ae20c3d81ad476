"""Every flag that a message names exists in the command that prints it."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_adamba.commands.command import Group, find
from megatron_adamba.commands.main import COMMANDS
from megatron_adamba.config.cli import build_parser
from megatron_adamba.config.script import as_settings, without_flags

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
OF_ANOTHER = re.compile(r"adamba((?: [\w{}-]+)+?) --([a-z][\w.-]*)")
"""a command, with its folders, and a flag behind it: advice to call that one"""

OWN = "megatron_adamba/commands/"
PRINTED_BY: dict[str, tuple[str, ...]] = {
    "megatron_adamba/data/corpus.py": ("data", "tokenizer"),
    "megatron_adamba/data/corpus_files.py": ("data", "tokenizer"),
    "megatron_adamba/data/indexed_builder.py": ("data",),
    "megatron_adamba/data/preprocess.py": ("data",),
    "megatron_adamba/data/sentencepiece_training.py": ("tokenizer",),
    "megatron_adamba/data/tokenizer_options.py": (
        "data",
        "compare-with-xz",
        "surgery import gpt-oss",
        "surgery import hf",
        "surgery import nanochat",
    ),
    "megatron_adamba/evaluation/report.py": ("plot",),
    "megatron_adamba/inference/": ("generate",),
    "megatron_adamba/inference/items.py": ("evaluate",),
    "megatron_adamba/inference/serving/": ("serve",),
    "megatron_adamba/checkpoint/offline.py": ("checkpoint convert",),
    "megatron_adamba/surgery/canonical_source.py": (),
    "megatron_adamba/surgery/expand": ("surgery expand",),
    "megatron_adamba/surgery/export_gpt_oss.py": ("surgery export hf",),
    "megatron_adamba/surgery/export_nanochat.py": ("surgery export nanochat",),
    "megatron_adamba/surgery/extract.py": ("surgery extract",),
    "megatron_adamba/surgery/graft.py": ("surgery graft",),
    "megatron_adamba/surgery/import_gpt_oss.py": ("surgery import gpt-oss", "surgery import hf"),
    "megatron_adamba/surgery/import_nanochat.py": ("surgery import nanochat",),
    "megatron_adamba/surgery/importing.py": (
        "surgery import gpt-oss",
        "surgery import hf",
        "surgery import nanochat",
    ),
    "megatron_adamba/surgery/merge_average.py": ("surgery merge-average",),
    "megatron_adamba/surgery/nanochat_config.py": ("surgery import nanochat",),
    "megatron_adamba/surgery/requested.py": ("surgery extract", "surgery compare"),
    "megatron_adamba/commands/checkpoint/": ("checkpoint",),
    "megatron_adamba/commands/policies.py": ("evaluate",),
    "megatron_adamba/commands/prompts.py": ("generate",),
    "megatron_adamba/commands/generation_options.py": ("generate", "chat"),
    "megatron_adamba/commands/surgery/compare.py": ("surgery compare",),
    "megatron_adamba/commands/surgery/expand.py": ("surgery expand",),
    "megatron_adamba/commands/surgery/extract.py": ("surgery extract",),
    "megatron_adamba/commands/surgery/graft.py": ("surgery graft",),
    "megatron_adamba/commands/surgery/jobs.py": ("surgery extract", "surgery graft", "surgery import hf"),
    "megatron_adamba/commands/surgery/merge_average.py": ("surgery merge-average",),
    "megatron_adamba/commands/surgery/published.py": ("surgery import gpt-oss", "surgery import nanochat"),
    "megatron_adamba/commands/surgery/reorder.py": ("surgery reorder",),
}
"""which commands print the messages of a room or file, the longest beginning counting; a script prints its own, and
what is not here is reached by a run alone, or names flags of a run, which `run_script` turns into settings elsewhere"""
IGNORED = (
    "megatron_adamba/commands/benchmark",
    "megatron_adamba/engine/ds_schema.py",
    "megatron_adamba/commands/harness.py",
)
"""benchmarks call programs, the harness has a command line of its own, and what DeepSpeed knows is no message"""


def flags_of(command: str, parsers: dict[str, set[str]]) -> set[str]:
    """Of `surgery import hf`: all that may stand behind these words; of a group: behind one of its members."""
    if command not in parsers:
        entry, prog, rest = find(COMMANDS, command.split(), "adamba")
        assert not rest, command
        if isinstance(entry, Group):
            parsers[command] = set().union(*(flags_of(f"{command} {name}", parsers) for name in entry.members))
        else:
            parser = build_parser(prog) if command == "train" else entry.parser(prog)
            parsers[command] = _own_flags(parser)
    return parsers[command]


def _own_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag.removeprefix("--") for action in parser._actions for flag in action.option_strings}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is neither documentation nor a parser's own: `{}` for what is put into it."""
    tree = ast.parse(path.read_text())
    aside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            aside.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            aside |= {id(part) for part in node.values if isinstance(part, ast.Constant)}
        called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
        called = called or getattr(getattr(node, "func", None), "id", "")
        if called in ("add_argument", "Command", "Program", "Group", "job_command", "CommandParser", "_Launcher"):
            aside |= {id(inner) for inner in ast.walk(node)}
        elif called in ("replace", "removeprefix", "startswith"):
            aside |= {id(inner) for argument in node.args for inner in ast.walk(argument)}
    for node in ast.walk(tree):
        if id(node) in aside:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def printers(name: str) -> tuple[str, ...]:
    if name.startswith(OWN) and name not in PRINTED_BY and name.count("/") == OWN.count("/"):
        own = name.removeprefix(OWN).removesuffix(".py").replace("_", "-")
        return (own,) if own in COMMANDS.members else ()
    best = max((start for start in PRINTED_BY if name.startswith(start)), key=len, default=None)
    return ("train",) if best is None else PRINTED_BY[best]


def test_every_flag_exists_where_it_is_named():
    parsers: dict[str, set[str]] = {}
    of_a_run = flags_of("train", parsers)
    wrong, seen = [], 0
    files = ROOT.glob("megatron_adamba/**/*.py")
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(IGNORED):
            continue
        for line, text in messages(path):
            for words, flag in OF_ANOTHER.findall(text):
                known = [word for word in words.split() if re.fullmatch(r"[a-z][a-z-]*", word)]
                if flag.rstrip(".-") not in flags_of(" ".join(known), parsers):
                    wrong.append(f"{name}:{line}: adamba {' '.join(known)} has no --{flag}")
            for flag in FLAG.findall(OF_ANOTHER.sub("", text)):
                flag, seen = flag.rstrip("-"), seen + 1
                if flag.endswith((".", "_")) or f"--{flag}{{}}" in text:
                    exists = any(other.startswith(flag) for other in of_a_run)  # the rest is put in
                elif "." in flag:
                    exists = flag in of_a_run
                else:
                    lacking = [command for command in printers(name) if flag not in flags_of(command, parsers)]
                    exists = not lacking
                if not exists:
                    wrong.append(f"{name}:{line}: --{flag}")
    assert not wrong, "\n".join(wrong)
    assert seen > 250


def test_flags_of_a_run_are_settings_elsewhere():
    text = "x: --model.head_dim 7: try --model.head_dim 8 (adamba train --train.phase 2), --depth 3 or --top-k 2"
    assert as_settings(text) == (
        "x: model.head_dim 7: try model.head_dim 8 (adamba train --train.phase 2), depth 3 or --top-k 2"
    )
    assert without_flags("--top-k -1: must be 0, as --top-k=0; a--b") == "top_k -1: must be 0, as top_k=0; a--b"


def test_the_checkpoint_tool_advises_no_resume(tmp_path: Path, adamba):
    (tmp_path / "latest").mkdir()
    said = adamba("checkpoint", "verify", tmp_path)[2]
    assert said.startswith("error: ") and "latest" in said and "--resume" not in said
