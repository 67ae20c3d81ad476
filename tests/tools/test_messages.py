"""Every flag that a message names exists in the command that prints it."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_adamba.config.cli import build_parser
from megatron_adamba.config.script import as_settings, without_flags

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
OF_ANOTHER = re.compile(r"(\w+\.py)((?: [\w{}-]+)*?) --([a-z][\w.-]*)")
"""a command, with a subcommand and its folders, and a flag behind it: advice to call that one"""

PRINTED_BY: dict[str, tuple[str, ...]] = {
    "megatron_adamba/data/corpus.py": ("preprocess_data.py", "train_tokenizer.py"),
    "megatron_adamba/data/corpus_files.py": ("preprocess_data.py", "train_tokenizer.py"),
    "megatron_adamba/data/indexed_builder.py": ("preprocess_data.py",),
    "megatron_adamba/data/preprocess.py": ("preprocess_data.py",),
    "megatron_adamba/data/sentencepiece_training.py": ("train_tokenizer.py",),
    "megatron_adamba/data/tokenizer_options.py": (
        "preprocess_data.py",
        "compare_with_xz.py",
        "surgery.py import gpt-oss",
        "surgery.py import hf",
        "surgery.py import nanochat",
    ),
    "megatron_adamba/evaluation/report.py": ("plot_metrics.py",),
    "megatron_adamba/inference/": ("generate.py",),
    "megatron_adamba/inference/items.py": ("evaluate.py",),
    "megatron_adamba/inference/serving/": ("serve.py",),
    "megatron_adamba/checkpoint/offline.py": ("checkpoint.py convert",),
    "megatron_adamba/surgery/canonical_source.py": (),
    "megatron_adamba/surgery/expand": ("surgery.py expand",),
    "megatron_adamba/surgery/export_gpt_oss.py": ("surgery.py export hf",),
    "megatron_adamba/surgery/export_nanochat.py": ("surgery.py export nanochat",),
    "megatron_adamba/surgery/extract.py": ("surgery.py extract",),
    "megatron_adamba/surgery/graft.py": ("surgery.py graft",),
    "megatron_adamba/surgery/import_gpt_oss.py": ("surgery.py import gpt-oss", "surgery.py import hf"),
    "megatron_adamba/surgery/import_nanochat.py": ("surgery.py import nanochat",),
    "megatron_adamba/surgery/importing.py": (
        "surgery.py import gpt-oss",
        "surgery.py import hf",
        "surgery.py import nanochat",
    ),
    "megatron_adamba/surgery/merge_average.py": ("surgery.py merge-average",),
    "megatron_adamba/surgery/nanochat_config.py": ("surgery.py import nanochat",),
    "megatron_adamba/surgery/requested.py": ("surgery.py extract", "surgery.py compare"),
    "tools/checkpoint.py": ("checkpoint.py any",),
    "tools/inference_commands/policies.py": ("evaluate.py",),
    "tools/inference_commands/sources.py": ("generate.py",),
    "tools/surgery_commands/compare.py": ("surgery.py compare",),
    "tools/surgery_commands/expand.py": ("surgery.py expand",),
    "tools/surgery_commands/extract.py": ("surgery.py extract",),
    "tools/surgery_commands/graft.py": ("surgery.py graft",),
    "tools/surgery_commands/jobs.py": ("surgery.py extract", "surgery.py graft", "surgery.py import hf"),
    "tools/surgery_commands/merge_average.py": ("surgery.py merge-average",),
    "tools/surgery_commands/published.py": ("surgery.py import gpt-oss", "surgery.py import nanochat"),
    "tools/surgery_commands/reorder.py": ("surgery.py reorder",),
}
"""which commands print the messages of a room or file, the longest beginning counting; a script prints its own, and
what is not here is reached by a run alone, or names flags of a run, which `run_script` turns into settings elsewhere"""
IGNORED = ("tools/benchmark", "megatron_adamba/engine/ds_schema.py", "tools/inference_commands/harness.py")
"""benchmarks call programs, the harness has a command line of its own, and what DeepSpeed knows is no message"""


class _Captured(Exception):
    pass


def parser_of(script: str) -> argparse.ArgumentParser:
    """The real one, caught where the script is about to use it."""
    found: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(parser)
        raise _Captured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
        main = runpy.run_path(str(ROOT / "tools" / script))["main"]
        with pytest.raises(_Captured):
            main([])
    return found[0]


def flags_of(command: str, parsers: dict[str, argparse.ArgumentParser]) -> set[str]:
    """Of `surgery.py import hf`: all that may stand behind these words; `any`: behind one of its subcommands."""
    script, *words = command.split()
    if script == "pretrain_adamba.py":
        parser = build_parser(script)
    else:
        parser = parsers.setdefault(script, None) or parser_of(script)
        parsers[script] = parser
    for word in words:
        inner = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if word == "any":
            return set().union(*map(_own_flags, inner.values()))
        parser = inner[word]
    return _own_flags(parser)


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
        if called == "add_argument":
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
    if name.count("/") == 1 and name.startswith("tools/") and name not in PRINTED_BY:
        return (name.removeprefix("tools/"),)
    best = max((start for start in PRINTED_BY if name.startswith(start)), key=len, default=None)
    return ("pretrain_adamba.py",) if best is None else PRINTED_BY[best]


def test_every_flag_exists_where_it_is_named():
    parsers: dict[str, argparse.ArgumentParser] = {}
    of_a_run = flags_of("pretrain_adamba.py", parsers)
    wrong, seen = [], 0
    files = [*ROOT.glob("megatron_adamba/**/*.py"), *ROOT.glob("tools/**/*.py"), ROOT / "pretrain_adamba.py"]
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(IGNORED):
            continue
        for line, text in messages(path):
            for script, words, flag in OF_ANOTHER.findall(text):
                known = [word for word in words.split() if re.fullmatch(r"[a-z][a-z-]*", word)]
                if flag.rstrip(".-") not in flags_of(" ".join([script, *known]), parsers):
                    wrong.append(f"{name}:{line}: {script} has no --{flag}")
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


def test_flags_of_a_run_are_settings_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "x: --model.head_dim 7: try --model.head_dim 8 (pretrain_adamba.py --train.phase 2), --depth 3 or --top-k 2"
    assert as_settings(text) == (
        "x: model.head_dim 7: try model.head_dim 8 (pretrain_adamba.py --train.phase 2), depth 3 or --top-k 2"
    )
    assert without_flags("--top-k -1: must be 0, as --top-k=0; a--b") == "top_k -1: must be 0, as top_k=0; a--b"


def test_the_checkpoint_tool_advises_no_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "latest").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["checkpoint.py", "verify", str(tmp_path)])
        runpy.run_path(str(ROOT / "tools" / "checkpoint.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "latest" in said and "--resume" not in said
