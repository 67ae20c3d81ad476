"""When one rank fails, people read what it said, once; when one is killed, that one alone is named."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import time

import numpy as np
from training.runs import ROOT, arguments
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


def test_ranks_of_other_settings_are_told_before_anything_happens(tmp_path, data):
    from forked import ForkedScript
    from training.runs import environment, free_port

    run, port, processes = tmp_path / "run", str(free_port()), []
    for rank, seed in enumerate((5, 6)):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = arguments(data, run, train__seed=seed)
        processes.append(ForkedScript(ROOT / "pretrain_adamba.py", words, environment() | places))
    said = "".join(process.communicate(timeout=90)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: --train.seed: rank 1 was started with 6, rank 0 with 5; give all ranks the same command line and the "
        f"same files (on rank 1, {socket.gethostname()})"
    ]
    assert not run.exists()


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, data):
    """Of a rank beside the first one, where the folder is looked at on another machine."""
    from megatron_adamba.training.run_folder import _QuietHandler

    (tmp_path / "log").mkdir()
    handler = _QuietHandler(tmp_path / "log", delay=True)
    handler.emit(logging.LogRecord("x", logging.INFO, "x", 1, "text", (), None))


def test_files_that_vanish_during_a_run_are_one_line(tmp_path, data):
    """The folder of checkpoints becomes a file between two of them."""
    run = tmp_path / "run"
    processes = start(2, arguments(data, run, train__steps=5000, checkpoint__interval=20))
    root = run / "checkpoints"
    wait_until(processes, lambda: (root / "latest").exists())
    root.rename(tmp_path / "elsewhere")
    root.write_text("no folder")
    codes, outputs = ends(processes)
    said = "".join(errors for _, errors in outputs)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and str(root) in lines[0] and "Traceback" not in said, said
    assert set(codes) <= {5, 6, 9}


def test_what_one_machine_alone_lacks_is_said_with_its_rank(tmp_path, data):
    """The first rank's message names the rank and its machine: where the first one looks, the file is there."""
    from forked import ForkedScript
    from training.runs import environment, free_port

    run, port, processes = tmp_path / "run", str(free_port()), []
    for rank, folder in enumerate((data, tmp_path / "not-mounted")):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = arguments(folder, run)
        processes.append(ForkedScript(ROOT / "pretrain_adamba.py", words, environment() | places))
    said = "".join(process.communicate(timeout=90)[1] for process in processes)
    assert [process.returncode for process in processes] == [3, 3]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "not-mounted/train" in lines[0], said
    assert lines[0].endswith(f"(on rank 1, {socket.gethostname()})")


def test_what_one_machine_lacks_before_the_ranks_meet_is_said_with_its_rank(tmp_path, data):
    from forked import ForkedScript
    from training.runs import environment, free_port

    places = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = arguments(data, tmp_path / "run", data__tokenizer=str(tmp_path / "not-there.model"))
    process = ForkedScript(ROOT / "pretrain_adamba.py", words, environment() | places)
    said = process.communicate(timeout=60)[1]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "not-there.model" in lines[0], said
    assert lines[0].endswith(f"(on rank 1, {socket.gethostname()})")
