"""The pages and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[tuple[str, str]]:
    """(page, command) of every line of every bash block, and of every `adamba ...` inside a sentence that is whole."""
    found = []
    for name, page in zip(NAMES, PAGES):
        for block in code_blocks(page.read_text(), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.strip().startswith("#"):
                    found.append((name, line.strip()))
    return found


COMMAND_LINES = command_lines()


def words_of_adamba(line: str) -> list[str] | None:
    """The words behind `adamba`, `pretrain_adamba.py` or the module; None where the line starts something else."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["adamba"]:
        return words[1:]
    for place, word in enumerate(words):
        if word == "pretrain_adamba.py":
            return ["train", *words[place + 1 :]]
    return None
