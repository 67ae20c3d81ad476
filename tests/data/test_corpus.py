"""Where documents come from, and which are held out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_adamba.data.corpus import iterate_documents
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import is_validation
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
    left_out = LeftOut()
    documents = list(iterate_documents(str(tmp_path), left_out=left_out))
    assert documents == [
        ("a.py", "caf\u00e9"),
        ("b/two.txt", "two\r\n"),
        ("lines.jsonl:1", "one"),
        ("lines.jsonl:4", "four ?"),
    ]
    assert left_out == {"binary": 1, "not utf-8": 1, "empty": 2, "hidden": 1}
    assert left_out.names["empty"] == ["lines.jsonl:3", "nothing.txt"] and left_out.names["hidden"] == [".git/"]
    assert "1 binary (b/image.png), 2 empty (lines.jsonl:3, nothing.txt)" in left_out.described()


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
    with pytest.raises(DataError, match=r"\(1 binary \(image\)\)"):
        list(iterate_documents(str(tmp_path)))
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no files"):
        list(iterate_documents(str(tmp_path / "x.jsonl")))


RECORDS = [{"text": "caf\u00e9\nno"}, {"id": 3, "text": "two \u2028 lines"}, {"text": "three", "more": {"a": [1]}}]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def texts(spec: Path, **options: object) -> list[str]:
    return [text for _, text in iterate_documents(str(spec), **options)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NDJson", "a.json", "a.JSON", "part-00000", "a.dump", "a.txt"]
)
def test_json_lines_under_any_name(tmp_path: Path, name: str):
    (tmp_path / name).write_text(LINES)
    assert texts(tmp_path / name) == texts(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps({"version": 1, "data": RECORDS}, indent=1),
        json.dumps({"id": [1, 2, 3], "text": TEXTS}),
        json.dumps({"text": dict(enumerate(TEXTS))}),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.Json"])
def test_one_json_value(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    assert texts(tmp_path / name) == texts(tmp_path) == TEXTS


def test_one_record_and_an_array_under_other_names(tmp_path: Path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[1], indent=2))
    assert texts(tmp_path / "one.json") == TEXTS[1:2]
    for name in ("records", "records.jsonl"):
        (tmp_path / name).write_text(json.dumps(RECORDS, indent=2))
        assert texts(tmp_path / name) == TEXTS
    with pytest.raises(DataError, match="record 2: no text under --json-key text"):
        (tmp_path / "mixed.json").write_text(json.dumps([RECORDS[0], {"body": "x"}]))
        texts(tmp_path / "mixed.json")


def test_text_that_looks_like_json_stays_text(tmp_path: Path):
    for name, content in {
        "a.md": '{"text": "an example"}\n\nis what a line looks like\n',
        "b.py": '[{"text": 1}]\n',
        "c.txt": "[{ not json",
        "d.txt": '{"body": "x"}\n',
    }.items():
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == [content]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("part-00000", '{"text": "one"}\n{"text": "tw', "line 2: not JSON"),
        ("part-00000", '{"text": "one"}\nprose', "line 2: not JSON"),
        ("a.dump", '{"id": 1, "text": "one"}\n\n{"id": 2, "te', "line 3: not JSON"),
        ("a.txt", '{"text": "one"}\n{', "line 2: not JSON"),
        ("part-00000", '{"text": "on', "line 1: not JSON"),
        ("part-00000", '{"text": "one"}{"text": "two"}\n', "line 1: more than one JSON value"),
        ("a.dump", '{"text": "one"} {"text": "two"}\n{"text": "three"}\n', "line 1: more than one JSON value"),
        ("part-00000", '{"text": "one"},\n{"text": "two"}\n', "line 1: more than one JSON value"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_that_are_damaged_are_no_text(name: str, content: str, words: str, packed: bool, tmp_path: Path):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        texts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["", "\n", '\n{"text": "two"}\n', "\n\nprose"])
def test_a_first_line_longer_than_what_is_looked_at(encoding: str, end: str, tmp_path: Path):
    path = tmp_path / "part-00000"
    path.write_bytes(
        (json.dumps({"id": "\u00e9x" * (1 << 20), "text": "one"}, ensure_ascii=False) + end).encode(encoding)
    )
    if "prose" in end:
        with pytest.raises(DataError, match="line 3: not JSON"):
            texts(path)
    else:
        assert texts(path) == (["one", "two"] if "two" in end else ["one"])
    path.write_text('{"id": 1, "text": "' + "x" * (1 << 21))
    with pytest.raises(DataError, match="line 1: not JSON"):
        texts(path)
    # nothing but spaces, and one without the key, are text
    path.write_text(" \n" * (1 << 20) + "a")
    assert texts(path) == [" \n" * (1 << 20) + "a"]
    content = json.dumps({"id": "x" * (1 << 21)})
    path.write_text(content)
    assert texts(path) == [content]


def test_a_record_over_several_lines_without_an_ending(tmp_path: Path):
    (tmp_path / "one").write_text(json.dumps(RECORDS[1] | {"id": 3}, indent=2))
    assert texts(tmp_path / "one") == TEXTS[1:2]
    (tmp_path / "no").write_text('{"text": "an example,\nand more')
    assert texts(tmp_path / "no") == ['{"text": "an example,\nand more']


@pytest.mark.parametrize("indent", [None, 1])
def test_notebooks_are_json(indent: int | None, tmp_path: Path):
    cells = [{"cell_type": "code", "source": ["import os\n"], "outputs": []}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}, indent=indent))
    (tmp_path / "a.txt").write_text("a")
    left_out = LeftOut()
    assert texts(tmp_path, left_out=left_out) == ["a"]
    assert left_out == {"json without text": 1} and left_out.names["json without text"] == ["a.ipynb"]


def test_json_without_a_text_is_named(tmp_path: Path):
    for name, content in {"package.json": '{"name": "x"}', "bad.json": "{,}", "deep.json": "[" * 100_000}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "a.txt").write_text("a")
    left_out = LeftOut()
    assert texts(tmp_path, left_out=left_out) == ["a"]
    assert left_out == {"json without text": 1, "not json": 2}
    with pytest.raises(DataError, match=r"1 json without text \(package\.json\)"):
        texts(tmp_path / "package.json")


def test_frames_that_are_skipped(tmp_path: Path):
    """As pzstd puts one in front of each of its own."""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0\1\2\3\4"
    (tmp_path / "a.zst").write_bytes(b"".join(skipped + packed("zst", part) for part in (b"one ", b"two ")))
    assert texts(tmp_path / "a.zst") == ["one two "]


def packed_with(tool: list[str], path: Path) -> Path:
    """By the program that people have."""
    if shutil.which(tool[0]) is None:
        pytest.skip(f"no {tool[0]} here")
    subprocess.run([*tool, str(path)], check=True)
    return next(found for found in path.parent.iterdir() if found.name.startswith(path.name + "."))


def packed(kind: str, content: bytes) -> bytes:
    if kind == "zst":
        import zstandard

        half = len(content) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + compress(content[half:])  # frames, as parallel compressors write
    return {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[kind](content)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "bz2"])
def test_compressed_files(tmp_path: Path, kind: str):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.jsonl.{kind}").write_bytes(packed(kind, LINES.encode()))
    (folder / f"b.txt.{kind.upper()}").write_bytes(packed(kind, "caf\u00e9\r\n".encode()))
    (folder / "c.txt").write_bytes(packed(kind, b"no ending says it"))
    (folder / f"d.json.{kind}").write_bytes(packed(kind, json.dumps(RECORDS, indent=1).encode()))
    assert texts(folder) == [*TEXTS, "caf\u00e9\r\n", "no ending says it", *TEXTS]
    whole = packed(kind, b"a line\n" * 100_000)
    for name, content in (("cut", whole[: len(whole) * 3 // 4]), ("bad", whole[:-9] + bytes(9))):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as caught:
            texts(folder / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tool", [["gzip"], ["xz"], ["zstd", "-q", "--rm"], ["bzip2"]])
def test_what_the_programs_themselves_write(tmp_path: Path, tool: list[str]):
    (tmp_path / "a.ndjson").write_text(LINES)
    assert texts(packed_with(tool, tmp_path / "a.ndjson")) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_encodings_that_a_mark_tells(tmp_path: Path, encoding: str, name: str):
    content = {"a.txt": "caf\u00e9 \U0001f600\r\n", "a.jsonl": LINES, "a.json": json.dumps(RECORDS)}[name]
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    (tmp_path / name).write_bytes((mark + content).encode(encoding))
    assert texts(tmp_path / name) == ([content] if name == "a.txt" else TEXTS)
    cut = (mark + content).encode(encoding)[:-1]
    if not encoding.startswith("utf-8"):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(DataError, match=r"utf-(16|32)|not json"):
            texts(tmp_path / name)


def test_what_a_folder_leaves_out_is_counted_and_named(tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "real").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "real" / "b.txt").write_text("b")
    (folder / "linked").symlink_to(folder / "real")
    (folder / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "link.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe")
    (folder / "t.model").write_text("x")
    (folder / "d.bin.tmp-77").write_text("x")
    (folder / ".hidden").write_text("x")
    left_out = LeftOut()
    assert texts(folder, left_out=left_out) == ["a", "a", "b"]
    assert left_out.names == {
        "linked folder": ["linked/", "loop/"],
        "broken link": ["gone"],
        "no regular file": ["pipe"],
        "tokenizer": ["t.model"],
        "temporary": ["d.bin.tmp-77"],
        "hidden": [".hidden"],
    }


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything: within it the process is somebody else."""
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_what_may_not_be_read_is_counted():
    # pytest's own folder is its user's alone
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.txt").write_text("a")
        assert texts(folder) == ["a"]  # loads what is loaded late, while everything can be read
        (folder / "b.txt").write_text("b")
        (folder / "closed").mkdir(mode=0)
        (folder / "b.txt").chmod(0)
        left_out = LeftOut()
        with as_nobody():
            assert texts(folder, left_out=left_out) == ["a"]
        assert left_out.names == {"unreadable": ["b.txt", "closed/"]}
        (folder / "closed").chmod(0o700)


def test_names_that_are_no_text(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.png")).write_bytes(b"\0")
    (tmp_path / "a.txt").write_text("a")
    left_out = LeftOut()
    assert texts(tmp_path, left_out=left_out) == ["a"]
    assert left_out.described().encode() == b"1 binary (bad\\udcff.png)"


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
