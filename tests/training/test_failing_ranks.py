"""When one rank fails, people read what it said, once; when one is killed, that one alone is named."""

from __future__ import annotations

import shutil
import signal
import time

import numpy as np
from training.runs import arguments
from training.test_signals import start, wait_until

from megatron_adamba.engine.lost_ranks import FailureNote, _described
from megatron_adamba.errors import DataError, LostRankError


def ends(processes, patience=90):
    outputs = [process.communicate(timeout=patience) for process in processes]
    return [process.returncode for process in processes], outputs


def test_a_rank_that_raises_is_not_reported_as_killed(tmp_path, data):
    """One document in the second half of what is read holds a token that is not in the vocabulary; the rank that comes
    to it first says so, and nobody advises to resume."""
    copy, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, copy)
    tokens = np.fromfile(copy / "train.bin", dtype="<u2")
    tokens[tokens.size // 2] = 9999
    tokens.tofile(copy / "train.bin")
    processes = start(2, arguments(copy, run, train__steps=500, checkpoint__interval=0, logging__interval=100))
    codes, outputs = ends(processes)
    said = "".join(errors for _, errors in outputs)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "token id 9999 is outside the vocabulary" in lines[0], said
    assert "without a word" not in said and "Traceback" not in said
    assert sorted(codes) in ([3, 9], [3, 3])


def test_of_four_ranks_the_killed_one_is_named(tmp_path, data):
    run = tmp_path / "run"
    processes = start(4, arguments(data, run, train__steps=5000, checkpoint__interval=0, elastic__plans_per_step=1))
    metrics = run / "metrics.jsonl"
    wait_until(processes, lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    processes[2].send_signal(signal.SIGKILL)
    codes, outputs = ends(processes)
    assert codes == [9, 9, -9, 9]
    said = "".join(errors for _, errors in outputs)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: rank 2 ended without a word"), said


def test_a_rank_that_hangs_is_not_called_killed():
    assert _described([], [3]).startswith("rank 3 still runs and does not answer")
    assert _described([1], [1, 3]).startswith("rank 1 ended without a word")
    assert "all of them run" in _described([], [])


def test_the_first_failure_is_the_one_that_is_told(tmp_path):
    note = FailureNote(tmp_path)
    assert note.read() is None
    assert note.tells(1, DataError("line one")) and not note.tells(0, DataError("another"))
    assert (note.read().rank, note.read().text) == (1, "line one")
    assert not note.tells(2, LostRankError("of that", first_survivor=False))
    note.clear()
    begun = time.monotonic()
    assert note.tells(0, DataError("mine")) and time.monotonic() - begun < 0.5
    (tmp_path / "logs" / "failure.json").write_text("{")
    assert note.read() is None
