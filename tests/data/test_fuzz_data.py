"""Damaged and hostile files of data: whatever is in them, they are read or refused in one line, and soon."""

from __future__ import annotations

import base64
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import write_dataset
from test_tokenizers import hugging_face_file

from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.packed import PackedDataset, evaluation_batches
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import AdambaError

MUTATIONS = 2000
FEWER = 300
"""of files that are a plain list, or a small note"""
EXTREMES = (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
VALUES = (None, True, -1, 0, 1.5, 2**40, 10**30, "", "x", "\ud800", [], {}, [[]], "a" * 300)
TEXT = "Nested 2024 <eod>\n\t caf\u00e9 \U0001f600 "


def mutate(content: bytes, source: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled or put in; numbers of 4 and 8 bytes replaced by extreme ones."""
    out = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        place = source.randrange(len(out) + 1)
        kind = source.randrange(6)
        if kind == 0 and place < len(out):
            out[place] = source.randrange(256)
        elif kind == 1:
            del out[place : place + source.choice((1, 4, 8, 50))]
        elif kind == 2:
            out[place:place] = source.randbytes(source.choice((1, 4, 8, 50)))
        elif kind == 3:
            out[place:place] = out[place : place + 40]
        elif kind == 4:
            del out[place:]
        else:
            width = source.choice((4, 8))
            out[place : place + width] = struct.pack("<Q", source.choice(EXTREMES))[:width]
    return bytes(out)


def mutate_json(content: bytes, source: random.Random) -> bytes:
    """One value somewhere in it replaced by one of another kind; at times the bytes instead."""
    if source.random() < 0.3:
        return mutate(content, source)
    values = json.loads(content)
    holder, key = None, None
    found = values
    while isinstance(found, dict | list) and found and (holder is None or source.random() < 0.8):
        holder = found
        key = source.choice(list(found)) if isinstance(found, dict) else source.randrange(len(found))
        found = holder[key]
    if source.random() < 0.1:
        return b"[" * 100_000 if source.random() < 0.5 else content[:-1] + b',"deep":' + b'{"a":' * 5000
    if source.random() < 0.2:
        del holder[key]
    else:
        holder[key] = source.choice((*VALUES, found, [found], {"a": found}))
    return json.dumps(values).encode()


def survives(read: Callable[[], object]) -> bool:
    """Whether it was read; refused in one line is the other thing that may happen."""
    try:
        read()
    except AdambaError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode(TEXT)
    assert all(0 <= token < tokenizer.vocab_size for token in ids) and tokenizer.eod_id < tokenizer.vocab_size
    tokenizer.decode(ids)
    tokenizer.encode_batch([TEXT, ""])


def read_dataset(prefix: Path) -> None:
    indexed = IndexedDataset(prefix)
    for place in range(min(indexed.num_documents, 20)):
        indexed.document(place)
    batches = evaluation_batches(indexed, 8, 2, 0, max_tokens=200)
    batches[0]
    dataset = PackedDataset(indexed, 8, 0, 0)
    for place in range(3):
        dataset[place]


def rank_content() -> bytes:
    pieces = [bytes([value]) for value in range(256)] + [b"20", b"202", b" the"]
    return b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces))


@pytest.mark.parametrize("suffix", [".idx", ".meta.json", ".bytes"])
def test_datasets(suffix: str, tmp_path: Path):
    prefix = tmp_path / "d"
    write_dataset(prefix, [[3, 4, 5, 0], [6, 0], [7] * 30 + [0]] * 3, [4, 2, 31] * 3)
    path = Path(f"{prefix}{suffix}")
    content, source = path.read_bytes(), random.Random(21)
    read, count = 0, FEWER if suffix == ".bytes" else MUTATIONS
    for _ in range(count):
        path.write_bytes((mutate_json if suffix == ".meta.json" else mutate)(content, source))
        read += survives(lambda: read_dataset(prefix))
    assert read < count / 2


@pytest.mark.parametrize("kind", ["tokenizer.json", "t.model", "gpt2.tiktoken", "gpt2.tiktoken.meta.json"])
def test_tokenizers(kind: str, model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    made = hugging_face_file(tmp_path / "made").read_bytes()
    note = json.dumps({"split_pattern": "nanochat", "special_tokens": {"<|a|>": 400}, "eod_token": "<|a|>"}).encode()
    contents = {"tokenizer.json": made, "t.model": model_path.read_bytes(), "gpt2.tiktoken": rank_content()}
    content = (contents | {"gpt2.tiktoken.meta.json": note})[kind]
    path, source = tmp_path / kind, random.Random(21)
    named = path
    if kind.endswith(".meta.json"):
        named = tmp_path / "gpt2.tiktoken"
        named.write_bytes(rank_content())
    read, count = 0, FEWER if named != path else MUTATIONS
    for _ in range(count):
        path.write_bytes((mutate_json if kind.endswith(".json") else mutate)(content, source))
        read += survives(lambda: read_tokenizer(named))
    assert 0 < read < count
    capfd.readouterr()  # where the Rust libraries panic they say so themselves


def test_bounds_that_wrap(tmp_path: Path):
    """Differences of int64 wrap: documents that begin at 2^62, or before the first sequence."""
    prefix = tmp_path / "d"
    write_dataset(prefix, [[3, 0], [4, 0], [5, 0], [6, 0]])
    path = tmp_path / "d.idx"
    content = path.read_bytes()
    bounds = len(content) - 8 * 5
    for inner in ((2**62, -(2**62), 0), (2**63 - 1, -(2**63), -1), (5, -(2**63), 2**62), (-1, 0, 1), (3, 2, 1)):
        path.write_bytes(content[: bounds + 8] + struct.pack("<3q", *inner) + content[bounds + 32 :])
        assert not survives(lambda: read_dataset(prefix))
    pointers = bounds - 8 * 4
    for inner in ((2**63 - 4, -(2**63), 12), (4, 8, 13), (4, 2**62, 12)):
        path.write_bytes(content[: pointers + 8] + struct.pack("<3q", *inner) + content[pointers + 32 :])
        assert not survives(lambda: read_dataset(prefix))
    odd = content[: pointers - 4] + struct.pack("<i", 1) + content[pointers:]
    path.write_bytes(odd)
    (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:-2])
    assert survives(lambda: IndexedDataset(prefix))
    path.write_bytes(odd[: bounds - 8] + struct.pack("<q", 13) + odd[bounds:])
    (tmp_path / "d.bin").write_bytes(b"\0" * 15)
    assert not survives(lambda: IndexedDataset(prefix))


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".meta.json", ".bytes"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(suffix: str, tmp_path: Path):
    write_dataset(tmp_path / "d", [[3, 4, 5, 0]] * 5, [3] * 5)
    path = tmp_path / f"d{suffix}"
    path.unlink()
    os.mkfifo(path)
    assert not survives(lambda: read_dataset(tmp_path / "d"))


@pytest.mark.parametrize("name", ["tokenizer.json", "t.model", "gpt2.tiktoken"])
def test_a_pipe_or_a_folder_in_the_place_of_a_tokenizer(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)
    assert not survives(lambda: load_tokenizer(str(tmp_path / name)))
    assert not survives(lambda: load_tokenizer(f"tiktoken:{tmp_path / name}"))
    (tmp_path / "inner" / name).mkdir(parents=True)
    assert not survives(lambda: load_tokenizer(str(tmp_path / "inner" / name)))
    assert not survives(lambda: load_tokenizer(f"tiktoken:{tmp_path / 'inner'}"))
