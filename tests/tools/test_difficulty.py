"""The difficulty tasks: answers that are right, and held-out prompts that nobody trains on."""

from __future__ import annotations

import importlib.util
import json
import string
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("difficulty_tasks", ROOT / "examples" / "difficulty" / "tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tasks
    spec.loader.exec_module(tasks)
    folder = tmp_path_factory.mktemp("data")
    assert tasks.main(["--output", str(folder), "--train", "6000", "--held-out", "300"]) == 0
    return folder


def held_out(folder: Path, tier: str, side: str = "heldout") -> list[tuple[str, str]]:
    lines = (folder / f"{side}-{tier}.jsonl").read_text().splitlines()
    return [(item["prompt"], item["answer"]) for item in map(json.loads, lines)]


def answer_of(prompt: str) -> str:
    """From the words of a prompt."""
    task, *words = prompt.removesuffix(">").split()
    return {
        "copy": lambda: words[0],
        "count": lambda: str(sum(letter == words[0] for letter in words[1])),
        "add": lambda: str(int(words[0]) + int(words[1])),
        "len": lambda: str(sum(letter in string.ascii_lowercase for letter in words[0])),
        "sum": lambda: str(sum(int(word) for word in words)),
        "rev": lambda: "".join(reversed(words[0])),
        "digits": lambda: str(sum(int(digit) for digit in words[0])),
    }[task]()


def test_answers_are_right_and_tiers_their_tasks(folder):
    tasks = {"easy": {"copy"}, "medium": {"count", "add", "len"}, "hard": {"sum", "rev", "digits"}}
    for tier, names in tasks.items():
        items = held_out(folder, tier)
        assert len(items) == len(set(items)) == 300
        assert {prompt.split()[0] for prompt, _ in items} == names
        assert all(prompt.endswith(">") and answer == answer_of(prompt) for prompt, answer in items)


def test_nobody_trains_on_what_is_held_out(folder):
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    prompts = [text[: text.index(">") + 1] for text in texts]
    assert all(text[len(prompt) :] == answer_of(prompt) for text, prompt in zip(texts, prompts))
    tiers = ("easy", "medium", "hard")
    kept = {prompt for tier in tiers for prompt, _ in held_out(folder, tier)}
    tuning = {prompt for tier in tiers for prompt, _ in held_out(folder, tier, "tuning")}
    assert len(texts) == 6000 and not (kept | tuning) & set(prompts)
    assert len(kept) == 900 and len(tuning) == 450 and not kept & tuning
    # one easy item to two medium and three hard ones
    shares = [sum(prompt.split()[0] in names for prompt in prompts) for names in (("copy",), ("sum", "rev", "digits"))]
    assert shares == [1000, 3000]
