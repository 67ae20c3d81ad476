"""kill -9 at any moment of writing: nothing half-written has the target's name, and the next run goes through."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from surgery.nested_models import content_of
from surgery.test_surgery_memory import ROOT, openai_folder

from megatron_adamba.checkpoint.verify import verify
from megatron_adamba.errors import StorageError
from megatron_adamba.surgery import writing
from megatron_adamba.surgery.extract import extract

SECONDS = 60
COMMANDS = {
    "import": (("import", "gpt-oss"), (), 3),
    "graft": (("graft",), ("--pattern", "EME"), 3),
    "expand": (("expand",), ("--hidden", "512"), 2),
    "extract": (("extract",), ("--width", "128"), 2),
}
"""words in front of SRC and DST, words behind, and how many times it is killed"""
SMALL_FILES = ("--max-shard-size", "2MB")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """What `import` reads, MXFP4, and what the others read."""
    root = tmp_path_factory.mktemp("killed")
    openai_folder(root / "published", True, layers=2, hidden=256, vocab=4096, experts=8)
    run("import", "gpt-oss", root / "published", root / "canonical")
    return {"import": root / "published"} | dict.fromkeys(("graft", "expand", "extract"), root / "canonical")


def start(*words: object) -> subprocess.Popen:
    program = [sys.executable, ROOT / "tools" / "surgery.py", *words]
    # with threads of their own some children would wait for a processor most of the time
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: object) -> None:
    process = start(*words)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, error


def bytes_in(folder: Path) -> int:
    """Of a folder that somebody fills, or renames."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return 0


def kill_while_writing(words: tuple[object, ...], target: Path, aside: Path, moment: float) -> None:
    """Once so many bytes are written; at the latest when the target has its name."""
    process, deadline = start(*words), time.monotonic() + SECONDS
    while process.poll() is None and not target.exists() and (not aside.exists() or bytes_in(aside) < moment):
        assert time.monotonic() < deadline, "wrote nothing"
        time.sleep(0.0005)
    process.kill()
    _, error = process.communicate()
    assert not error, error


@pytest.mark.parametrize("operation", COMMANDS)
def test_killed_while_writing(operation, sources, surgery_tool, tmp_path):
    before, after, kills = COMMANDS[operation]
    source, target, aside = sources[operation], tmp_path / "made", tmp_path / "made.tmp"
    words = (*before, source, target, *after, *SMALL_FILES)
    reference = tmp_path / "reference" / "made"
    surgery_tool(*before, source, reference, *after, *SMALL_FILES)
    untouched, whole = content_of(source), content_of(reference)
    dice, total = random.Random(operation), bytes_in(reference)
    shutil.rmtree(reference.parent)
    interrupted = 0
    for _ in range(kills):
        kill_while_writing(words, target, aside, dice.uniform(0, 1.1) * total)
        assert content_of(source) == untouched
        if target.exists():
            verify(target)
            assert content_of(target) == whole and not aside.exists()
            shutil.rmtree(target)
        interrupted += aside.exists()
    assert interrupted, "no kill came while it wrote"
    run(*words)
    verify(target)
    assert content_of(target) == whole and content_of(source) == untouched
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_run_left_is_no_reason_to_lack_space(sources, tmp_path, monkeypatch):
    """Looked at before anything is written, and behind clearing."""
    job, folder = extract(sources["extract"], 128), tmp_path / "made"
    aside, free = folder.with_name("made.tmp"), job.num_bytes
    aside.mkdir()
    (aside / "model-00001-of-00001.safetensors").write_bytes(b"left by a run that was killed")
    usage = shutil.disk_usage(tmp_path)
    left = lambda _: usage._replace(free=free - bytes_in(aside))
    monkeypatch.setattr(writing.shutil, "disk_usage", left)
    writing.write_job(job, folder, 10**9, lambda *_: None)
    verify(folder)
    shutil.rmtree(folder)
    free -= 1
    with pytest.raises(StorageError, match="are to be written"):
        writing.write_job(job, folder, 10**9, lambda *_: None)
    assert not list(tmp_path.iterdir())
