"""However the tools of data end: nobody is left waiting, nothing lies about, one line says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from data_helpers import INDENTED
from test_preprocess_tools import ROOT, run_tool

from megatron_adamba.data.corpus import iterate_documents
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.errors import ConfigError


def children(process: int) -> list[int]:
    """Of Linux's own account."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def as_from_a_terminal() -> None:
    """Whatever started the tests may ignore Ctrl-C, as shells do for what runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def endless(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Preprocessing of far too much, once it writes and its workers are there; nothing of it is left behind."""
    process = _started(tmp_path)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _started(tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "in").mkdir()
    for number in range(2000):
        (tmp_path / "in" / f"{number}.py").write_text(INDENTED * 60)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--tokenizer", "bytes"]
    command += ["--input", *[str(tmp_path / "in")] * 500, "--output", str(tmp_path / "out" / "d"), "--workers", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )
    waited = time.monotonic()
    while time.monotonic() < waited + 60:
        found = list((tmp_path / "out").glob("d.bin.tmp-*")) if (tmp_path / "out").exists() else []
        if found and found[0].stat().st_size and len(children(process.pid)) >= 2:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def gone(processes: list[int], patience: float = 20) -> bool:
    until = time.monotonic() + patience
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, processes))


@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGTERM, False), (signal.SIGHUP, True), (signal.SIGINT, True), (signal.SIGUSR1, True)],
)
def test_a_signal_clears_everything_away(number: signal.Signals, group: bool, tmp_path: Path):
    """What a terminal or SLURM sends goes to the whole group."""
    with endless(tmp_path) as process:
        workers = children(process.pid)
        os.killpg(process.pid, number) if group else process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert errors.count("\n") == 1 and errors.startswith("error: "), errors
        assert gone(workers) and list((tmp_path / "out").iterdir()) == []


def test_workers_end_with_a_parent_that_was_killed_and_the_next_run_clears_up(tmp_path: Path):
    with endless(tmp_path) as process:
        workers = children(process.pid)
        with pytest.raises(ConfigError, match=f"process {process.pid} is writing this dataset"):
            IndexedDatasetBuilder(tmp_path / "out" / "d", "<u2")
        process.kill()
        process.communicate(timeout=30)
        assert gone(workers)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"d.bin.tmp-{process.pid}"]
    with IndexedDatasetBuilder(tmp_path / "out" / "d", "<u2") as builder:
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"d.bin.tmp-{os.getpid()}"]
        builder.add_document([1, 2, 3])
        builder.finalize()
    assert IndexedDataset(tmp_path / "out" / "d").num_tokens == 3


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py"])
def test_a_reader_that_goes_away_ends_it_quietly(tool: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(INDENTED * 20)
    output = ["--tokenizer", "bytes", "--output", str(tmp_path / "d")]
    if tool == "train_tokenizer.py":
        output = ["--vocab-size", "300", "--output", str(tmp_path / "t.model")]
    command = [sys.executable, str(ROOT / "tools" / tool), "--input", str(tmp_path / "a.txt"), *output]
    for closed in ("stdout", "both"):
        read, write = os.pipe()
        os.close(read)
        errors = write if closed == "both" else subprocess.PIPE
        report = tmp_path / f"{closed}.json"
        done = subprocess.run([*command, "--json", str(report)], stdout=write, stderr=errors, check=False, timeout=60)
        os.close(write)
        assert not done.stderr and done.returncode in (1, 141) and report.exists()


def test_a_second_run_over_the_same_folder_takes_nothing_of_the_first(tmp_path: Path):
    (tmp_path / "a.txt").write_text(INDENTED)
    (tmp_path / "b.txt").write_text(INDENTED * 2)
    words = ("--input", tmp_path, "--tokenizer", "bytes", "--output", tmp_path / "d", "--json", tmp_path / "r.json")
    first, second = run_tool("preprocess_data.py", *words), run_tool("preprocess_data.py", *words)
    assert (first.returncode, second.returncode) == (0, 0)
    assert IndexedDataset(tmp_path / "d").num_documents == 2
    assert "left out: 4 dataset (d.bin, d.bytes, d.idx, ...), 1 json without text (r.json);" in second.stdout
    left_out = LeftOut()
    assert [name for name, _ in iterate_documents(str(tmp_path), "source", left_out)] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("tool", "changes", "code", "words"),
    [
        ("preprocess_data.py", {"--json": "FOLDER"}, 2, "--json"),
        ("preprocess_data.py", {"--json": "FILE/report.json"}, 2, "is no folder"),
        ("preprocess_data.py", {"--output": "FILE/data"}, 2, "is no folder"),
        ("preprocess_data.py", {"--output": "FILE/deep/data"}, 2, "is no folder"),
        ("preprocess_data.py", {"--output": ""}, 2, "--output"),
        ("preprocess_data.py", {"--output": "x" * 250}, 2, "longer than 200 bytes"),
        ("preprocess_data.py", {"--workers": "-3"}, 2, "at least one worker"),
        ("preprocess_data.py", {"--workers": "100000"}, 2, "--workers 100000"),
        ("preprocess_data.py", {"--validation-fraction": "nan"}, 2, "--validation-fraction nan"),
        ("preprocess_data.py", {"--validation-fraction": "0"}, 2, "--validation-fraction 0"),
        ("preprocess_data.py", {"--input": "FOLDER/pipe"}, 3, "neither a file nor a folder"),
        ("preprocess_data.py", {"--input": ""}, 3, "neither a file nor a folder"),
        ("preprocess_data.py", {"--tokenizer": "FOLDER"}, 4, "the folder holds no tokenizer.json"),
        ("preprocess_data.py", {"--tokenizer": "FOLDER/pipe.model"}, 4, "no regular file"),
        ("preprocess_data.py", {"--split-pattern": "nanochat"}, 4, "leave --split-pattern out"),
        ("preprocess_data.py", {"--tokenizer": ""}, 4, "names nothing"),
        ("train_tokenizer.py", {"--vocab-size": "0"}, 2, "--vocab-size 0"),
        ("train_tokenizer.py", {"--vocab-size": "-5"}, 2, "--vocab-size -5"),
        ("train_tokenizer.py", {"--vocab-size": "99999999999"}, 2, "--vocab-size 99999999999"),
        ("train_tokenizer.py", {"--max-megabytes": "0"}, 2, "--max-megabytes 0"),
        ("train_tokenizer.py", {"--max-megabytes": "nan"}, 2, "--max-megabytes nan"),
        ("train_tokenizer.py", {"--max-megabytes": "inf"}, 2, "--max-megabytes inf"),
        ("train_tokenizer.py", {"--validation-fraction": "1"}, 2, "--validation-fraction 1"),
        ("train_tokenizer.py", {"--validation-fraction": "-0.1"}, 2, "--validation-fraction -0.1"),
        ("train_tokenizer.py", {"--output": "FOLDER"}, 2, "a file must be named"),
        ("train_tokenizer.py", {"--output": "FILE/x.model"}, 2, "is no folder"),
        ("train_tokenizer.py", {"--json": "FOLDER"}, 2, "--json"),
    ],
)
def test_values_that_cannot_work(tool: str, changes: dict, code: int, words: str, tmp_path: Path, in_process):
    (tmp_path / "file").write_text(INDENTED)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.model")
    given = {"--input": str(tmp_path / "file"), "--tokenizer": "bytes", "--output": str(tmp_path / "out" / "d")}
    if tool == "train_tokenizer.py":
        given = {"--input": str(tmp_path / "file"), "--output": str(tmp_path / "out" / "t.model")}
    if "--validation-fraction" in changes and tool == "preprocess_data.py":
        given["--split"] = None
    given |= {
        flag: value.replace("FOLDER", str(tmp_path)).replace("FILE", str(tmp_path / "file"))
        for flag, value in changes.items()
    }
    found, errors = in_process(
        tool, [f"{flag}={value}" if value is not None else flag for flag, value in given.items()]
    )
    assert found == code and errors.startswith("error: ") and errors.count("\n") == 1 and words in errors, errors
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A tool's exit code and stderr, without a new interpreter for each."""
    import runpy

    def call(tool: str, words: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [tool, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        return ended.value.code or 0, capsys.readouterr().err

    return call
