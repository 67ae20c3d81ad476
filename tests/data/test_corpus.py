"""Where documents come from, and which are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_adamba.data.corpus import is_validation, iterate_documents
from megatron_adamba.errors import DataError


def test_folder_is_read_in_order_and_what_is_no_text_is_counted(tmp_path: Path):
    for name, content in {
        "b/two.txt": b"two\r\n",
        "a.py": "caf\u00e9".encode(),
        "b/image.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
        "nothing.txt": b"",
        ".git/config": b"secret",
        "lines.jsonl": b'{"text": "one"}\n\n{"text": ""}\n{"text": "four \\ud800"}\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    skipped: Counter[str] = Counter()
    documents = list(iterate_documents(str(tmp_path), skipped=skipped))
    assert documents == [
        ("a.py", "caf\u00e9"),
        ("b/two.txt", "two\r\n"),
        ("lines.jsonl:1", "one"),
        ("lines.jsonl:4", "four ?"),
    ]
    assert skipped == {"binary": 1, "not utf-8": 1, "empty": 2}


def test_single_files(tmp_path: Path):
    (tmp_path / "x.txt").write_text("hello")
    assert list(iterate_documents(str(tmp_path / "x.txt"))) == [("x.txt", "hello")]
    (tmp_path / "x.jsonl").write_text('{"body": "b", "text": 3}\n')
    assert list(iterate_documents(str(tmp_path / "x.jsonl"), "body")) == [("x.jsonl:1", "b")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2: not JSON"),
        (b'"\xff"', "line 2: not JSON"),
        (b'{"body": "x"}', "line 2: no text under --json-key text .*body"),
        (b'{"text": 3}', "line 2: no text under --json-key text"),
        (b"[1]", "line 2: no text .*not an object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=words) as caught:
        list(iterate_documents(str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_sources_without_a_document(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        list(iterate_documents(str(tmp_path / "missing")))
    with pytest.raises(DataError, match=r"no document in it \(no files\)"):
        list(iterate_documents(str(tmp_path)))
    (tmp_path / "image").write_bytes(b"\0\1")
    with pytest.raises(DataError, match=r"\(1 binary\)"):
        list(iterate_documents(str(tmp_path)))
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no files"):
        list(iterate_documents(str(tmp_path / "x.jsonl")))


def test_standard_library_without_its_tests():
    documents = dict(iterate_documents("python-stdlib"))
    names = list(documents)
    assert names == sorted(names) and {"ast.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in Path(name).parts[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(part.startswith("config-") for part in parts)
    assert not any("_sysconfigdata" in name for name in names)
    assert sum(map(len, documents.values())) > 5_000_000


def test_held_out_documents_depend_on_their_id_only():
    names = [f"folder/file{number}.py" for number in range(4000)]
    held_out = [is_validation(name, 0.05) for name in names]
    assert 140 < sum(held_out) < 260
    assert held_out == [is_validation(name, 0.05) for name in names]
    assert all(is_validation(name, 0.3) for name, held in zip(names, held_out) if held)
    assert [name for name, held in zip(names, held_out) if held][:3] == FIRST_HELD_OUT


FIRST_HELD_OUT = ["folder/file37.py", "folder/file54.py", "folder/file73.py"]
