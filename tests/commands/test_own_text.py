"""`adamba train --input`: from texts alone to a model, its pictures and a sample."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import run_forked
from tiny import TINY_SHAPE

from megatron_adamba.commands.own_recipe import FEWEST_STEPS, recipe_for, vocab_size_for
from megatron_adamba.commands.own_text import without_own_flags
from megatron_adamba.data.indexed_dataset import IndexedDataset

ROOT = Path(__file__).parents[2]
TINY = TINY_SHAPE | {"model.widths": "[8,32]"}


def train(folder: Path, *words: object, code: int = 0, **environment: str) -> str:
    """Output of `adamba train` in a folder."""
    flags = [word for pair in TINY.items() for word in (f"--{pair[0]}", pair[1])]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = run_forked(ROOT / "pretrain_adamba.py", [*words, *flags], kept, folder, timeout=400)
    assert done.returncode == code, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout if code == 0 else done.stderr


def test_a_text_becomes_a_model_and_the_next_call_goes_on(tmp_path):
    """With the steps given, nothing is measured. A second text gets a folder of its own."""
    (tmp_path / "book.txt").write_text("In the beginning were words, and more words followed.\n" * 200)
    out = train(tmp_path, "--input", "book.txt", "--train.steps", 4)
    run = tmp_path / "runs" / "book"
    for name in ("metrics.jsonl", "eval.json", "pareto.png", "curves.png", "sample.txt", "model/config.json"):
        assert (run / name).stat().st_size, name
    assert "tokenizer  bytes: the text is too short" in out and "see runs/book" in out
    assert [row["width"] for row in json.loads((run / "eval.json").read_text())["rows"]] == [8, 32]
    parts = [IndexedDataset(run / "data" / side) for side in ("train", "validation")]
    assert [part.num_documents for part in parts] == [1, 1]
    text = b"".join(bytes(part.document(0)[:-1].tolist()) for part in parts).decode()
    assert text == (tmp_path / "book.txt").read_text()
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert settings["data"]["tokenizer"] == "bytes" and settings["train"]["seq_len"] == 256
    before = (run / "settings.yaml").stat().st_mtime_ns
    out = train(tmp_path, "--input", "book.txt", "--train.steps", 6)
    assert "goes on with what is there" in out and (run / "settings.yaml").stat().st_mtime_ns == before
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6
    other = tmp_path / "other"
    other.mkdir()
    (other / "book.txt").write_text("Another book altogether, of other words.\n" * 200)
    assert "see runs/book-2" in train(tmp_path, "--input", other / "book.txt", "--train.steps", 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["five.jsonl", "notes.md", "rows.jsonl.gz", "rows.jsonl.zst", "folder"])
def test_every_kind_of_text_within_the_minutes(tmp_path, kind):
    import zstandard

    lines = [f"Line {number} of a small text about number {number}. " * 30 for number in range(5)]
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for number, line in enumerate(lines):
            (path / f"{number}.txt").write_text(line)
    else:
        packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
        path.write_bytes("\n\n".join(lines).encode() if kind == "notes.md" else packed(rows))
    out = train(tmp_path, "--input", kind, "--minutes", 0.3)
    run = tmp_path / "runs" / kind.split(".")[0]
    assert ((run / "sample.txt").stat().st_size and f"steps {FEWEST_STEPS}" in out) or "read the text" in out
    assert IndexedDataset(run / "data" / "validation").num_documents == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "5"], "--minutes: goes with --input PATH"),
        (["--input", "book.txt", "--minutes", "0"], "--minutes 0.0: must lie between 0.1"),
        (["--input", "none.txt"], "--input none.txt: no such file or folder"),
        (["--input", "book.txt", "--data.train", "x"], "--data.train: the dataset is made from --input"),
        (["--input", "book.txt", "--logging.run_dir", "full"], "--logging.run_dir full: holds something else"),
    ],
)
def test_what_is_refused(adamba, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, _, errors = adamba("train", *words)
    assert code in (2, 3) and errors.startswith(f"error: {told}") and errors.count("\n") == 1, errors
    assert not (tmp_path / "runs").exists()


def test_of_many_ranks_none_prepares_texts(adamba, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--input: one process prepares the texts" in adamba("train", "--input", str(tmp_path))[2]


def test_own_flags_are_taken_out():
    words = ["--input", "a", "b", "--train.steps=3", "--minutes=4", "--input=c", "--model.widths", "8,16"]
    assert without_own_flags(words) == ["--train.steps=3", "--model.widths", "8,16"]


def test_pieces_follow_the_text():
    assert [vocab_size_for(size) for size in (49_999, 50_000, 300_000, 600_000, 10**9)] == [None, 512, 1024, 2048, 4096]


@pytest.mark.parametrize(("tokens", "seq_len"), [(30, 8), (300, 16), (5_000, 256), (10**7, 512)])
def test_windows_follow_the_text(tokens, seq_len):
    assert recipe_for(tokens, "d", "bytes", scaled=True).sections["train"][1]["seq_len"] == seq_len


def test_steps_follow_the_time_and_the_text():
    recipe = recipe_for(10**6, "d", "bytes", scaled=True)
    steps = lambda made: made.sections["train"][1]["steps"]
    assert steps(recipe.with_steps(0.5, 300, 6)) == 600
    assert steps(recipe.with_steps(50, 300, 6)) == FEWEST_STEPS
    assert steps(recipe.with_steps(1e-6, 300, 6)) == 40 * 10**6 // (8 * 256)
    assert "600 steps of 0.50 s fit into 6 minutes" in recipe.with_steps(0.5, 300, 6).as_yaml()


@pytest.mark.slow
def test_three_minutes_of_an_encyclopaedia_read_like_it(tmp_path):
    """Real prose and the recipe as it is. What is written is made of the text's words; what is learned at every width
    is more than `xz` finds in the held-out text."""
    import lzma
    import re

    from texts import wikipedia

    text = wikipedia(600_000)
    (tmp_path / "book.txt").write_text(text)
    command = [sys.executable, "-m", "megatron_adamba", "train", "--input", "book.txt", "--minutes", "3"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "book"
    rows = json.loads((run / "eval.json").read_text())["rows"]
    held_out = text.encode()[-rows[0]["bytes"] :]
    xz = 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    assert max(row["bits_per_byte"] for row in rows) < xz, (rows, xz)
    known = set(re.findall(r"[a-z]+", text.lower()))
    words = re.findall(r"[a-z]+", (run / "sample.txt").read_text().lower())[1:-1]
    assert len(words) > 20 and sum(word in known for word in words) > 0.6 * len(words), words
