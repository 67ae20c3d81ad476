"""Bars with a total and the time left on a terminal, and nothing anywhere else."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys

import pytest
from commands.test_small_tools import checkpoint, dataset  # noqa: F401
from rich.console import Console
from surgery.nested_models import saved, source_model
from surgery.test_gates_carried import gated_source

from megatron_adamba.commands.progress import progress_bar
from megatron_adamba.data.corpus import corpus_bytes
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import split_documents

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
TIME = r"\d+:\d\d:\d\d +left"


def terminal() -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=100)


def shown(text: str) -> str:
    """Without colours and movements of the cursor."""
    return CODES.sub("", text)


@pytest.fixture
def seen(adamba, monkeypatch):
    """seen(words...): standard output and error of a command that ends well, where standard error is a terminal."""

    def call(*words: object) -> tuple[str, str]:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        code, out, err = adamba(*words)
        assert code == 0, err
        assert err.endswith("\x1b[2K"), "the bar goes when the work is done"
        return out, shown(err)

    return call


def test_a_total_and_the_time_left():
    console = terminal()
    with progress_bar("comparing", 40, "batches", console) as bar:
        for _ in range(40):
            bar.advance()
    assert re.search(rf"comparing .*40/40 batches {TIME}", shown(console.file.getvalue()))


def test_bytes_with_their_speed():
    console = terminal()
    with progress_bar("writing", 3_000_000, "bytes", console) as bar:
        bar.advance(1_000_000)
        bar.advance(2_000_000)
    assert re.search(rf"writing .*3.0/3.0 MB .*B/s {TIME}", shown(console.file.getvalue()))


def test_a_total_that_comes_later_and_work_of_unknown_length():
    console = terminal()
    with progress_bar("measuring", None, "batches", console) as bar:
        bar.advance()
        bar.expect(8)
        bar.advance(3)
    assert re.search(r"measuring .* 4/8 batches", shown(console.file.getvalue()))
    console = terminal()
    with progress_bar("reading", 10, "bytes", console) as bar:
        bar.advance(10)
        bar.turn_to("training")
    assert re.search(r"training .* -:--:-- +left", shown(console.file.getvalue()))


def test_nothing_is_written_where_nobody_looks(capsys):
    file = io.StringIO()
    with progress_bar("writing", 5, "bytes", Console(file=file, force_terminal=False)) as bar:
        bar.advance(5)
    with progress_bar("writing", 5, "bytes") as bar:
        bar.expect(7)
        bar.turn_to("waiting")
    assert file.getvalue() == "" and capsys.readouterr() == ("", "")


def test_what_is_printed_meanwhile_goes_where_it_went(capsys):
    console = terminal()
    with progress_bar("writing", 5, "bytes", console):
        print("a result")
    assert capsys.readouterr().out == "a result\n" and "a result" not in console.file.getvalue()


def test_evaluate(seen, checkpoint, dataset):  # noqa: F811
    words = ("evaluate", "--model", checkpoint, "--data", dataset, "--seq-len", 16, "--batch-size", 1)
    # three widths
    passes = re.search(rf"evaluating .*?(\d+)/(\d+) passes {TIME}", seen(*words)[1])
    assert passes and int(passes[2]) > 6 and int(passes[2]) % 3 == 0


def test_evaluate_adaptively(seen, tmp_path):
    model, items = gated_source(tmp_path / "model", "mixed", "TMEMETTT"), tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"prompt": f"sum {i}>", "answer": "ab"}) + "\n" for i in range(5)))
    words = ("--items", items, "--adaptive", "--fixed-exits", 2, "--exit-threshold", 0.4, 0.9, "--dtype", "fp32")
    _, err = seen("evaluate", "--model", model, *words)
    # three widths, two exits, two thresholds
    assert re.search(rf"evaluating .* {5 * 7}/{5 * 7} pieces {TIME}", err)


def test_surgery(seen, adamba, tmp_path):
    source, words = saved(source_model("mixed"), tmp_path / "a"), ("--width", 16)
    assert adamba("surgery", "extract", source, tmp_path / "quiet", *words)[2] == ""
    out, err = seen("surgery", "extract", source, tmp_path / "b", *words)
    assert re.search(rf"writing .*?(\d+\.\d)/\1 kB .*B/s {TIME}", err) and out.startswith(f"{tmp_path / 'b'} holds ")


def test_compare_and_reorder(seen, dataset, tmp_path):  # noqa: F811
    source, text = saved(source_model("mixed"), tmp_path / "a"), ("--data", dataset, "--seq-len", 16)
    _, err = seen("surgery", "compare", source, source, *text)
    found = re.search(rf"comparing .* (\d+)/(\d+) batches {TIME}", err)
    assert found and found[1] == found[2]
    _, err = seen("surgery", "reorder", source, tmp_path / "b", *text, "--batch-size", 1)
    done = re.findall(rf"measuring .*? (\d+)/(\d+) batches {TIME}", err)
    # every pass that was told beforehand came
    assert done and done[-1][0] == done[-1][1] and "writing" in err


def test_tokenizer_and_data(seen, tmp_path):
    corpus, model = tmp_path / "corpus", tmp_path / "t.model"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.py").write_text(f"# {number} café\ndef f(x):\n    return x + {number}\n" * 9)
    _, err = seen("tokenizer", "--input", corpus, "--vocab-size", 300, "--output", model)
    assert re.search(r"reading .* \d+\.\d/\d+\.\d kB", err) and re.search(r"training .* -:--:-- +left", err)
    words = ("data", "--input", corpus, "--tokenizer", "bytes", "--output")
    out, err = seen(*words, tmp_path / "seen")
    assert re.search(rf"tokenizing .*?(\d+\.\d)/\1 kB .*B/s {TIME}", err) and "60" in out


def test_a_log_of_tokenizer_and_data_holds_no_bar(adamba, tmp_path):
    (tmp_path / "a.txt").write_text("some words, and some more of them\n" * 50)
    words = ("--input", tmp_path / "a.txt", "--output")
    assert adamba("tokenizer", *words, tmp_path / "t.model", "--vocab-size", 280)[2] == ""
    assert adamba("data", *words, tmp_path / "x", "--tokenizer", "bytes")[2] == ""


def test_reading_reaches_the_bytes_of_the_files(tmp_path):
    """Whatever the files are: text, lines and lists of JSON, compressed, left out, empty."""
    lines = [json.dumps({"text": f"häuser {number}"}) for number in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(f"[{', '.join(lines)}]")
    (tmp_path / "c.txt").write_text("häuser\n" * 30)
    (tmp_path / "d.bin").write_bytes(b"\0" * 77)
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"words " * 500))
    read: list[int] = []
    texts = list(split_documents([str(tmp_path)], "text", 0.0, LeftOut(), read.append))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert corpus_bytes([str(tmp_path)]) == sum(read) == total
    # lines are counted one by one
    assert len(texts) == 62 and len([count for count in read if count]) > 62
