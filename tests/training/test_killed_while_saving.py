"""kill -9 of one rank, or of all, in the middle of saving: the job ends at once and the run goes on unharmed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training.runs import ROOT, arguments, command, environment, losses, train, write_corpus

from megatron_adamba.checkpoint.training import latest_checkpoint, verify_files

SECONDS = 15
"""in which a job with a dead rank has to have ended; DeepSpeed's launcher looks once a second"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> process, from the command lines of the launcher's descendants."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            group = os.getpgid(int(entry.name))
        except OSError:
            continue
        rank = next((word for word in words if word.startswith("--local_rank=")), None)
        if group == launcher and rank and "pretrain_adamba.py" in "".join(words):
            found[int(rank.removeprefix("--local_rank="))] = int(entry.name)
    return found


def changed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def wait_for_saving(process: subprocess.Popen, root: Path, source: random.Random) -> None:
    """Until a checkpoint is being written that is not the run's first, and a random moment more.

    What an earlier kill left half-written does not count.
    """
    deadline, start = time.monotonic() + 120, time.time()
    saves = source.randint(1, 4)
    seen: set[str] = set()
    while len(seen) < saves:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it saved"
        if latest_checkpoint(root) is not None:
            seen |= {path.name for path in root.glob("step-*.tmp") if changed(path) > start}
        time.sleep(0.001)
    time.sleep(source.uniform(0, 0.04))


def kill_while_saving(words: list[str], run: Path, victim: int | None, source: random.Random) -> str:
    """Start, kill rank `victim` (None: everybody); what the job printed."""
    process = subprocess.Popen(
        command(2, words),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_saving(process, run / "checkpoints", source)
    if victim is None:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(rank_processes(process.pid)[victim], signal.SIGKILL)
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    return printed


def kills(tmp_path: Path, data: Path, count: int, seed: int) -> None:
    source = random.Random(seed)
    run = tmp_path / "run"
    steps = {"train__steps": 2000, "optimizer__schedule": "constant", "checkpoint__interval": 1}
    for number in range(count):
        victim = (1, 0, None)[number % 3]
        asynchronous = str(number % 2 == 0).lower()
        words = [*arguments(data, run, **steps, checkpoint__asynchronous=asynchronous), "--resume", "auto"]
        printed = kill_while_saving(words, run, victim, source)
        if victim is not None:
            assert re.search(rf"^error: rank {victim} ended without a word", printed, re.MULTILINE), printed[-3000:]
            assert ("resumed from" in printed) == (number > 0)
        folder = latest_checkpoint(run / "checkpoints")
        assert folder is not None
        verify_files(folder)
    reached = max(losses(run))
    last = reached + 2
    train(2, [*arguments(data, run, **steps | {"train__steps": last}), "--resume", "auto"])
    whole = tmp_path / "whole"
    train(2, arguments(data, whole, **steps | {"train__steps": last, "checkpoint__interval": 0}))
    assert losses(run) == losses(whole)


def test_killed_while_saving(tmp_path, data):
    kills(tmp_path, data, 3, 7)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_twenty_moments_of_saving(tmp_path, data):
    kills(tmp_path, data, 20, 11)
