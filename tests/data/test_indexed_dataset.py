"""The .bin/.idx format against Megatron's own code, damage, and interrupted writing."""

from __future__ import annotations

import errno
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_dataset

from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import IndexedDataset, token_dtype
from megatron_adamba.errors import DataError
from megatron_adamba.files import write_atomically

DOCUMENTS = [[5, 6, 7, 0], [0], [8, 0], [9, 10, 11, 12, 13, 0]]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_megatron_reads_ours(tmp_path: Path, dtype: str):
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    write_dataset(tmp_path / "a", DOCUMENTS, dtype=dtype)
    theirs = MegatronDataset(str(tmp_path / "a"))
    assert len(theirs) == 4
    assert [theirs[place].tolist() for place in range(4)] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == np.dtype(dtype)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons_and_write_the_same_bytes(tmp_path: Path, dtype: type):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder

    builder = MegatronBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert ours.meta is None and ours.document_bytes is None
    assert [ours.document(place).tolist() for place in range(4)] == DOCUMENTS
    write_dataset(tmp_path / "ours", DOCUMENTS, dtype=np.dtype(dtype).str)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_megatron_documents_of_several_sequences(tmp_path: Path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder

    builder = MegatronBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])
    builder.add_document(torch.tensor([4, 5, 6, 7]), [1, 1, 2])
    builder.finalize(str(tmp_path / "m.idx"))
    dataset = IndexedDataset(tmp_path / "m")
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (2, 5, 7)
    assert dataset.document(1).tolist() == [4, 5, 6, 7]
    assert dataset.document_offsets.tolist() == [0, 3, 7]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 65536, 201088])
def test_dtype_is_megatrons_choice(vocab_size: int):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_reading(tmp_path: Path):
    dataset = write_dataset(tmp_path / "a.b", DOCUMENTS, num_bytes=[3, 0, 1, 5])
    assert (dataset.num_documents, dataset.num_tokens) == (4, 13)
    assert dataset.sequence_lengths.tolist() == [4, 1, 2, 6]
    assert dataset.tokens(3, 7).tolist() == [0, 0, 8, 0]
    assert dataset.document(3).base is not None and dataset.document(3).dtype == np.uint16
    assert dataset.document_bytes.tolist() == [3, 0, 1, 5]
    assert (dataset.meta.num_bytes, dataset.meta.num_documents) == (9, 4)
    for bad in (lambda: dataset.document(4), lambda: dataset.document(-1), lambda: dataset.tokens(0, 14)):
        with pytest.raises(IndexError):
            bad()


def damage(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


DAMAGES = {
    "no idx": (lambda p: p(".idx").unlink(), "no such file"),
    "no bin": (lambda p: p(".bin").unlink(), "no such file"),
    "empty idx": (lambda p: p(".idx").write_bytes(b""), "not a Megatron index"),
    "garbage idx": (lambda p: p(".idx").write_bytes(b"x" * 200), "not a Megatron index"),
    "short idx": (lambda p: p(".idx").write_bytes(p(".idx").read_bytes()[:-1]), "truncated"),
    "long idx": (lambda p: p(".idx").write_bytes(p(".idx").read_bytes() + b"\0"), "truncated or damaged"),
    "version": (lambda p: damage(p(".idx"), 9, struct.pack("<Q", 2)), "version 2"),
    "float": (lambda p: damage(p(".idx"), 17, b"\x07"), "dtype code 7"),
    "huge count": (lambda p: damage(p(".idx"), 18, struct.pack("<Q", 2**60)), "truncated"),
    "no document": (lambda p: p(".idx").write_bytes(p(".idx").read_bytes()[:18] + bytes(16)), "holds no document"),
    "short bin": (lambda p: p(".bin").write_bytes(p(".bin").read_bytes()[:-2]), "its index says"),
    "long bin": (lambda p: p(".bin").write_bytes(p(".bin").read_bytes() + b"\0\0"), "its index says"),
    "length": (lambda p: damage(p(".idx"), 34, struct.pack("<i", 5)), "disagree"),
    "negative length": (lambda p: damage(p(".idx"), 34, struct.pack("<i", -4)), "disagree"),
    "pointer": (lambda p: damage(p(".idx"), 34 + 16, struct.pack("<q", 4)), "disagree"),
    "bounds": (lambda p: damage(p(".idx"), 34 + 48 + 8, struct.pack("<q", 9)), "disagree"),
    "meta": (lambda p: p(".meta.json").write_text("{"), "JSON"),
    "meta keys": (lambda p: p(".meta.json").write_text("[]"), "damaged"),
    "meta version": (lambda p: edit_meta(p(".meta.json"), format_version=2), "format_version 2"),
    "meta count": (lambda p: edit_meta(p(".meta.json"), num_tokens=12), "num_tokens is 12"),
}


def edit_meta(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_on_opening(tmp_path: Path, name: str):
    prefix = tmp_path / "a"
    write_dataset(prefix, DOCUMENTS, num_bytes=[1, 1, 1, 1])
    harm, words = DAMAGES[name]
    harm(lambda suffix: Path(f"{prefix}{suffix}"))
    with pytest.raises(DataError, match=words) as caught:
        IndexedDataset(prefix)
    assert str(prefix) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_byte_counts(tmp_path: Path):
    dataset = write_dataset(tmp_path / "a", DOCUMENTS, num_bytes=[1, 1, 1, 1])
    (tmp_path / "a.bytes").write_bytes(bytes(12))
    with pytest.raises(DataError, match="4 documents need 16"):
        _ = dataset.document_bytes


def test_builder_refusals(tmp_path: Path):
    with pytest.raises(DataError, match="uint16 or int32"):
        IndexedDatasetBuilder(tmp_path / "f", np.float32)
    with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
        for bad in ([70_000], [-1]):
            with pytest.raises(DataError, match="does not fit"):
                builder.add_document(bad)
        with pytest.raises(DataError, match="no document"):
            builder.finalize()
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_and_keeps_the_old_dataset(tmp_path: Path):
    write_dataset(tmp_path / "a", [[1, 2, 0]], num_bytes=[2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write_and_fail(prefix: Path) -> None:
        with IndexedDatasetBuilder(prefix, np.uint16) as builder:
            builder.add_document([3, 0])
            raise KeyboardInterrupt

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            write_and_fail(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rewriting_without_sidecars_removes_the_old_ones(tmp_path: Path):
    write_dataset(tmp_path / "a", [[1, 2, 0]], num_bytes=[2])
    write_dataset(tmp_path / "a", [[3, 0], [4, 0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "folder" / "x"
    write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [("x", b"old")]


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("stage", ["add", "index", "rename"])
def test_killed_while_writing(tmp_path: Path, stage: str, replacing: bool):
    """Wherever SIGKILL falls, the old dataset is whole or no index stands under its name."""
    if replacing:
        write_dataset(tmp_path / "a", DOCUMENTS)
    script = f"""
import os, signal, sys
from megatron_adamba.data import indexed_builder as module
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
builder = module.IndexedDatasetBuilder({str(tmp_path / "a")!r}, "<u2")
builder.add_documents(module.np.ones(5000, dtype=int), [5000], [1])
if {stage!r} == "add": die()
if {stage!r} == "index": builder._write_index = die
if {stage!r} == "rename":
    replace = os.replace
    os.replace = lambda source, target: die() if str(target).endswith(".idx") else replace(source, target)
builder.finalize()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    if replacing and stage != "rename":
        assert IndexedDataset(tmp_path / "a").document(0).tolist() == DOCUMENTS[0]
        return
    names = {path.name for path in tmp_path.iterdir()}
    assert "a.idx" not in names and ("a.bin" in names) == (stage == "rename")
    with pytest.raises(DataError, match="no such file"):
        IndexedDataset(tmp_path / "a")
