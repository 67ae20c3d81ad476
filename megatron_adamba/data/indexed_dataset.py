"""Megatron's indexed datasets: PREFIX.bin holds token ids, PREFIX.idx says where each sequence and document lies.

Format (little-endian; as written by `megatron.core.datasets.indexed_dataset`):

    .bin   the token ids of all sequences, one after another
    .idx   9 bytes "MMIDIDX" and two zeros, uint64 version 1, uint8 dtype code, uint64 number of sequences,
           uint64 number of document boundaries, then int32 length in tokens [sequences], int64 byte offset in
           .bin [sequences], int64 first sequence of each document and a closing bound [documents + 1]

Two files of our own lie beside them, and a dataset may lack both: PREFIX.meta.json (`DatasetMeta`) and PREFIX.bytes,
one uint32 per document: the UTF-8 bytes of its text.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from megatron_adamba.errors import DataError
from megatron_adamba.schema import Count, Size, read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
META_FORMAT_VERSION = 1
DTYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
DATASET_SUFFIXES = (".idx", ".bin", ".bytes", ".meta.json")
CHECK_CHUNK = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65500 ids, else int32, as Megatron chooses."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def dataset_file(prefix: str | Path, suffix: str) -> Path:
    """PREFIX plus `suffix`; dots in the prefix stay."""
    return Path(f"{prefix}{suffix}")


@dataclass(frozen=True)
class DatasetMeta:
    """PREFIX.meta.json: what the tokens were made with. `num_bytes` counts the UTF-8 bytes of the documents' text."""

    tokenizer_hash: str
    tokenizer_name: str
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    eod_id: Annotated[int, Field(ge=0, lt=2**31)]
    num_documents: Size
    num_tokens: Size
    num_bytes: Count
    source: str
    format_version: int = META_FORMAT_VERSION

    @classmethod
    def read(cls, prefix: str | Path) -> DatasetMeta | None:
        """The sidecar of `prefix`, or None without one. Raises DataError for one that is not what it should be."""
        path = dataset_file(prefix, ".meta.json")
        if not os.path.lexists(path):
            return None
        meta = read_json(path, cls, DataError, "preprocess the data again, or remove the file")
        if meta.format_version != META_FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {meta.format_version} is not known here; "
                f"preprocess the data again to get version {META_FORMAT_VERSION}"
            )
        if meta.eod_id >= meta.vocab_size:
            raise DataError(
                f"{path}: eod_id {meta.eod_id} is outside its own vocabulary of {meta.vocab_size}; preprocess the data "
                "again, or remove the file"
            )
        return meta


class IndexedDataset:
    """Read-only, memory-mapped view of PREFIX.bin and PREFIX.idx.

    Opening checks the sizes of both files against each other and every offset, so that later reads cannot leave them.

    Attributes: `prefix`, `dtype` of the tokens, `num_documents`, `num_tokens`, `meta` (None without a sidecar),
    `vocab_size`: where it is set, whatever reads an id below 0 or from there on gets a DataError instead.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Raises DataError: a file is missing, truncated, garbage, or holds no document."""
        self.prefix = str(prefix)
        index_path, bin_path = dataset_file(prefix, ".idx"), dataset_file(prefix, ".bin")
        self.vocab_size: int | None = None
        for path in (index_path, bin_path):
            if not os.path.isfile(path):
                what = "no regular file" if os.path.lexists(path) else "no such file"
                raise DataError(f"{path}: {what}; a dataset is named by its prefix, e.g. data/train")
        self._read_index(index_path)
        self._check_offsets(index_path)
        self._tokens = self._map_tokens(bin_path)
        self.num_tokens = int(self._tokens.size)
        self.meta = DatasetMeta.read(prefix)
        self._check_meta()

    @property
    def num_sequences(self) -> int:
        return int(self.sequence_lengths.size)

    @property
    def num_documents(self) -> int:
        return int(self._document_bounds.size - 1)

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [num_documents + 1]: the first token of each document in the concatenated stream, and its end."""
        starts = np.append(self._pointers, self._tokens.nbytes) // self.dtype.itemsize
        return starts[self._document_bounds]

    def document(self, index: int) -> np.ndarray:
        """A view of one document's tokens, its closing end-of-document token included, in the stored dtype."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        first, last = self._document_bounds[index], self._document_bounds[index + 1]
        begin = self._sequence_start(first)
        return self._in_vocabulary(self._tokens[begin : self._sequence_start(last)])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """A view of tokens start to stop of all documents, concatenated in stored order."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        return self._in_vocabulary(self._tokens[start:stop])

    def check_ids(self, stop: int) -> None:
        """Reads tokens 0 to stop, for those who would else find out about a wrong one late. Raises DataError."""
        if self.vocab_size is not None:
            for start in range(0, stop, CHECK_CHUNK):
                self.tokens(start, min(start + CHECK_CHUNK, stop))

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """int64 tokens at `positions` (int64, any shape) of the concatenated stream."""
        return self._in_vocabulary(self._tokens[positions]).astype(np.int64)

    def _in_vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        if self.vocab_size is None or not tokens.size:
            return tokens
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"{self.prefix}: token id {high if high >= self.vocab_size else low} is outside the vocabulary of "
                f"{self.vocab_size}; preprocess the data with this tokenizer"
            )
        return tokens

    @cached_property
    def document_bytes(self) -> np.ndarray | None:
        """uint32 [num_documents]: UTF-8 bytes of each document's text, or None without PREFIX.bytes.

        Raises DataError where they are not as many, or not what the sidecar says of them all."""
        path = dataset_file(self.prefix, ".bytes")
        if not os.path.lexists(path):
            return None
        if not os.path.isfile(path):
            raise DataError(f"{path}: no regular file; preprocess the data again, or remove it")
        if path.stat().st_size != 4 * self.num_documents:
            raise DataError(
                f"{path}: {path.stat().st_size} bytes, but {self.num_documents} documents need "
                f"{4 * self.num_documents}; preprocess the data again"
            )
        sizes = np.memmap(path, dtype="<u4", mode="r")
        total = int(sizes.sum(dtype=np.uint64))
        if self.meta is not None and total != self.meta.num_bytes:
            raise DataError(
                f"{path}: {total} bytes of text, {dataset_file(self.prefix, '.meta.json')} says {self.meta.num_bytes}; "
                "the files are of different runs, preprocess the data again"
            )
        return sizes

    def _sequence_start(self, sequence: int) -> int:
        """First token of a sequence; of the bound past the last one, the number of tokens."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"{path}: not a Megatron index (it must begin with MMIDIDX); preprocess the data again")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{path}: index version {version} is not known here; preprocess the data again (version 1)")
        if code not in DTYPE_OF_CODE:
            raise DataError(f"{path}: dtype code {code} is no integer type; token ids are codes 4 (int32), 8 (uint16)")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise DataError(
                f"{path}: {size} bytes, but its header of {sequences} sequences and {bounds} document bounds "
                f"says {expected}; it is truncated or damaged, preprocess the data again"
            )
        if sequences == 0 or bounds < 2:
            raise DataError(f"{path}: the dataset holds no document; preprocess a source that is not empty")
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        content = np.memmap(path, mode="r")
        first, second = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.sequence_lengths = content[HEADER.size : first].view("<i4")
        self._pointers = content[first:second].view("<i8")
        self._document_bounds = content[second:].view("<i8")

    def _map_tokens(self, path: Path) -> np.ndarray:
        size = path.stat().st_size
        needed = int(self._pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if size != needed:
            raise DataError(
                f"{path}: {size} bytes, but its index says {needed}; it is truncated or from another run, "
                "preprocess the data again"
            )
        if size == 0:
            raise DataError(f"{path}: the dataset holds no token; preprocess a source that is not empty")
        return np.memmap(path, dtype=self.dtype, mode="r")

    def _check_offsets(self, path: Path) -> None:
        """Sequences lie one after another, and documents are made of whole, consecutive sequences.

        Compared and not subtracted where a difference could wrap."""
        damaged = DataError(f"{path}: offsets, lengths and documents disagree; it is damaged, preprocess it again")
        bounds = self._document_bounds
        if self._pointers[0] != 0 or bounds[0] != 0 or bounds[-1] != self.num_sequences:
            raise damaged
        for start in range(0, self.num_sequences, CHECK_CHUNK):
            pointers = self._pointers[start : start + CHECK_CHUNK + 1]
            lengths = self.sequence_lengths[start : start + CHECK_CHUNK].astype(np.int64)
            if np.any(lengths < 0) or np.any(pointers[1:] < pointers[:-1]):
                raise damaged
            if np.any(np.diff(pointers) != lengths[: pointers.size - 1] * self.dtype.itemsize):
                raise damaged
        for start in range(0, bounds.size, CHECK_CHUNK):
            part = bounds[start : start + CHECK_CHUNK + 1]
            if np.any(part[1:] < part[:-1]):
                raise damaged

    def _check_meta(self) -> None:
        if self.meta is None:
            return
        for name in ("num_documents", "num_tokens"):
            stated, found = getattr(self.meta, name), getattr(self, name)
            if stated != found:
                raise DataError(
                    f"{dataset_file(self.prefix, '.meta.json')}: {name} is {stated}, the dataset has {found}; "
                    "the files are of different runs, preprocess the data again"
                )
