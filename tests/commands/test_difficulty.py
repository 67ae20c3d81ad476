"""The difficulty tasks: answers that are right, and held-out prompts that nobody trains on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.items import Item, evaluate_mode
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"difficulty_{name}", ROOT / "examples" / "difficulty" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = ["--output", folder, "--train", "6000", "--held-out", "300"]
    subprocess.run([sys.executable, ROOT / "examples" / "difficulty" / "tasks.py", *words], check=True)
    return folder


def test_the_evaluation_is_a_script_too(tmp_path):
    path = ROOT / "examples" / "difficulty" / "evaluate.py"
    words = ["--model", tmp_path / "none", "--data", tmp_path, "--json", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, path, *words], capture_output=True, text=True)
    assert done.returncode == 5 and "none: no such folder" in done.stderr, done.stderr


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


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT")), "fp32")


@pytest.mark.parametrize(("seed", "rises"), [(0, True), (1, False)])
def test_the_cheapest_that_thinks_more_for_harder_tiers_is_chosen(loaded, monkeypatch, seed, rises):
    """A cheaper one whose tiers are out of order is passed by; without any in order the cheapest of all is taken."""
    evaluate = script("evaluate")
    monkeypatch.setattr(evaluate, "THRESHOLDS", (0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    monkeypatch.setattr(evaluate, "MIN_WIDTH", 8)
    letters = random.Random(seed)
    word = lambda: "".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 9))).encode()
    tiers = {tier: [Item((256, *word()), tuple(word())) for _ in range(4)] for tier in evaluate.TIERS}
    chosen = evaluate.choose(loaded, tiers, argparse.Namespace(exit_threshold=None, energy_price=None))
    found = []
    for price in evaluate.ENERGY_PRICES:
        for threshold in evaluate.THRESHOLDS:
            mode = Mode("adaptive", None, {"exit_threshold": threshold, "min_width": 8}, price)
            rows = [evaluate_mode(loaded, items, mode) for items in tiers.values()]
            exits = [sum(sum(row.answer_exits) / len(row.answer_exits) for row in tier) for tier in rows]
            widths = [sum(sum(row.answer_widths) / len(row.answer_widths) for row in tier) for tier in rows]
            in_order = all(values[0] < values[1] < values[2] for values in (exits, widths))
            found.append((evaluate.saved([row for tier in rows for row in tier]), in_order, mode))
    assert any(in_order for _, in_order, _ in found) == rises
    best = max((row for row in found if row[1] == rises), key=lambda row: row[0])
    assert chosen == best[2] and (best[0] < max(found, key=lambda row: row[0])[0]) == rises
