"""The pages: every command in them is one that the program takes, every link leads somewhere, every quoted message is
one that the program prints; the README stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from docs.pages import COMMAND_LINES, NAMES, PAGES, ROOT, code_blocks, words_of_adamba

from megatron_adamba.commands.command import Command, Group, find
from megatron_adamba.commands.main import COMMANDS
from megatron_adamba.config.cli import build_parser


def test_the_pages_hold_commands():
    ours = [line for _, line in COMMAND_LINES if words_of_adamba(line) is not None]
    assert len(ours) > 50, len(ours)


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{page}: {line[:50]}" for page, line in COMMAND_LINES])
def test_a_command_is_one_that_the_program_takes(page, line):
    words = words_of_adamba(line)
    if words is None:
        first = shlex.split(line, comments=True)
        first = [word for word in first if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if first[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(first[1:]) <= set(targets)
        elif first[0] in ("bash", "python"):
            assert (ROOT / first[1]).is_file(), first[1]
        else:
            assert first[0] in ("pip", "source", "curl", "pytest"), line
        return
    entry, prog, rest = find(COMMANDS, words, "adamba")
    assert not isinstance(entry, Group) or rest[:1] in (["--help"], []), line
    if prog == "adamba train":
        build_parser(prog).parse_args(_as_lists(rest), defaults=False)
    elif isinstance(entry, Command):
        entry.parser(prog).read(rest)


def _as_lists(words: list[str]) -> list[str]:
    from megatron_adamba.config.cli import _list_keys, _with_brackets

    return _with_brackets(words, _list_keys())


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_resolves(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), f"{name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    own = set(re.findall(r"\{#([\w-]+)\}", text))
    titles = re.findall(r"^#+ (.*?)(?: \{#[\w-]+\})?$", text, re.MULTILINE)
    return own | {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_messages_of_the_troubleshooting_page_are_the_programs():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text.partition("## By message")[2].partition("## Other")[0]
    source = " ".join(path.read_text() for path in (ROOT / "megatron_adamba").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row):
            assert quoted in source, quoted


def test_the_readme_is_short_and_the_matrix_is_the_programs():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    done = subprocess.run(
        [sys.executable, "-m", "megatron_adamba", "support-matrix"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() in (ROOT / "docs" / "layouts.md").read_text()


def test_python_blocks_are_python():
    blocks = [(page, block) for page in PAGES for block in code_blocks(page.read_text(), "python")]
    assert len(blocks) > 1
    for page, block in blocks:
        compile(block, str(page), "exec")
