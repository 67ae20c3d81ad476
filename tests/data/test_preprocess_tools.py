"""The two scripts, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data_helpers import INDENTED
from forked import run_forked

from megatron_adamba.data.held_out import is_validation
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.preprocess import PreprocessOptions, preprocess
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return run_forked(ROOT / "tools" / name, words, environment)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"f{number}.py").write_text(f"# {number} caf\u00e9\n" + INDENTED * (number + 1))
    (folder / "image.bin").write_bytes(b"\0")
    return folder


def test_train_then_preprocess(corpus: Path, tmp_path: Path):
    model = tmp_path / "t.model"
    done = run_tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 340, "--output", model)
    assert done.returncode == 0, done.stderr
    words = ("--input", corpus, "--tokenizer", model, "--output", tmp_path / "data", "--split")
    report = tmp_path / "report.json"
    done = run_tool("preprocess_data.py", *words, "--validation-fraction", 0.2, "--workers", 2, "--json", report)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 binary" in done.stdout

    tokenizer = load_tokenizer(str(model))
    texts = {path.name: path.read_text() for path in sorted(corpus.glob("*.py"))}
    table = json.loads(report.read_text())["datasets"]
    for side in ("train", "validation"):
        dataset = IndexedDataset(tmp_path / "data" / side)
        expected = [text for name, text in texts.items() if is_validation(name, 0.2) == (side == "validation")]
        assert [tokenizer.decode(dataset.document(place)) for place in range(dataset.num_documents)] == expected
        assert all(dataset.document(place)[-1] == tokenizer.eod_id for place in range(dataset.num_documents))
        assert dataset.document_bytes.tolist() == [len(text.encode()) for text in expected]
        assert dataset.meta.num_bytes == sum(len(text.encode()) for text in expected)
        assert dataset.meta.tokenizer_hash == tokenizer.hash and dataset.dtype == np.uint16
        assert table[str(tmp_path / "data" / side)]["num_tokens"] == dataset.num_tokens
    assert not [path for path in tmp_path.rglob("*") if "tmp-" in path.name]


def test_files_do_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_adamba.data.preprocess.CHUNK_CHARACTERS", 5000)  # many chunks
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        preprocess(PreprocessOptions((str(corpus),), str(folder), "bytes", split=True, workers=workers))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2", "3")]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 8


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--input": "missing"}, 3, "no such file or folder"),
        ({"--tokenizer": "missing.model"}, 4, "no such file"),
        ({"--validation-fraction": "1.5"}, 2, "e.g. 0.05"),
        ({"--workers": "0"}, 2, "at least one worker"),
        ({"--input": "ONE"}, 3, "leaves validation without a document (1 in all)"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(corpus: Path, tmp_path: Path, changes: dict, code: int, words: str):
    given = {"--input": corpus, "--tokenizer": "bytes", "--output": tmp_path / "data", **changes}
    if given["--input"] == "ONE":
        given["--input"] = tmp_path.parent / "one.txt"
        given["--input"].write_text("x")
    done = run_tool("preprocess_data.py", "--split", *(word for pair in given.items() for word in pair))
    assert done.returncode == code
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tokenizer_tool_errors(corpus: Path, tmp_path: Path):
    done = run_tool("train_tokenizer.py", "--input", corpus, "--output", tmp_path / "t.bin")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "ends in .model" in done.stderr


def test_bad_line_with_workers_leaves_nothing(tmp_path: Path):
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "fine"}\n' * 3000 + "{\n")
    options = PreprocessOptions((str(source),), str(tmp_path / "out" / "d"), "bytes", workers=2)
    with pytest.raises(DataError, match="line 3001"):
        preprocess(options)
    assert list((tmp_path / "out").iterdir()) == []


def test_output_that_is_a_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="a prefix, not a folder"):
        preprocess(PreprocessOptions((str(tmp_path),), str(tmp_path), "bytes"))


def test_a_worker_that_dies_is_reported(corpus: Path, tmp_path: Path):
    """The tokenizer file goes away between the check and the workers' start, then a worker is killed."""
    from megatron_adamba.data.preprocess import _Worker

    worker = _Worker(PreprocessOptions((str(corpus),), str(tmp_path / "d"), "missing.model", workers=2))
    try:
        with pytest.raises(Exception, match="no such file"):
            worker.receive()
    finally:
        worker.stop()
    worker = _Worker(PreprocessOptions((str(corpus),), str(tmp_path / "d"), "bytes", workers=2))
    try:
        worker._process.kill()
        with pytest.raises(DataError, match="a worker died"):
            worker.receive()
    finally:
        worker.stop()
