"""Writing Megatron's indexed datasets as a stream; the format is described in `indexed_dataset`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megatron_adamba.data.indexed_dataset import DTYPE_OF_CODE, HEADER, MAGIC, DatasetMeta, dataset_file
from megatron_adamba.errors import ConfigError, DataError
from megatron_adamba.files import sync_directory, temporary_path, written_file

MAX_LENGTH = 2**31 - 1
_SUFFIXES = (".bin", ".bytes", ".meta.json", ".idx")
"""the index last"""


class IndexedDatasetBuilder:
    """Streams documents into PREFIX.bin and, on `finalize`, gives all files of the dataset their names.

    Until then everything lies under temporary names in the same folder, and whatever dataset was there stays whole.
    The index gets its name last: without it nobody takes the rest for a dataset. As a context manager it removes its
    temporary files when the block ends without `finalize`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        """What a killed process left of the same dataset is removed first.

        Args: prefix: path without suffix; dtype: the tokens' integer type, see `token_dtype`.
        Raises OSError, and ConfigError where a live process writes the same dataset, or what is there is no file.
        """
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, name in DTYPE_OF_CODE.items() if np.dtype(name) == self.dtype), None)
        if self._code is None:
            raise DataError(f"{prefix}: tokens of type {self.dtype} have no code in an index; use uint16 or int32")
        self.num_tokens = 0
        self.num_bytes = 0
        self._lengths = array("i")
        self._bytes = array("I")
        dataset_file(prefix, ".bin").parent.mkdir(parents=True, exist_ok=True)
        self._files = {suffix: _file(self.prefix, suffix) for suffix in _SUFFIXES}
        _clear_leftovers(prefix, self._files)
        self._temporary: dict[str, Path] = {}
        self._stream: BinaryIO | None = self._open(".bin")
        self._lock = _held_lock(self._stream)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.abort()

    def add_document(self, tokens: Sequence[int] | np.ndarray, num_bytes: int = 0) -> None:
        """Appends one document (its end-of-document token included) and the UTF-8 size of its text."""
        self.add_documents(np.asarray(tokens), [len(tokens)], [num_bytes])

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int], num_bytes: Sequence[int]) -> None:
        """Appends documents that lie one after another in `tokens` (integers [sum(lengths)]).

        Raises DataError for an id that the dtype cannot hold and for a document of more than 2^31 - 1 tokens, OSError
        from the disk.
        """
        if self._stream is None:
            raise ValueError("the dataset is already finished")
        if sum(lengths) != tokens.size:
            raise ValueError(f"{tokens.size} tokens, lengths for {sum(lengths)}")
        limits = np.iinfo(self.dtype)
        if tokens.size and (int(tokens.min()) < limits.min or int(tokens.max()) > limits.max):
            raise DataError(f"{self.prefix}: a token id does not fit into {self.dtype}; use int32")
        if max(lengths, default=0) > MAX_LENGTH or max(num_bytes, default=0) > MAX_LENGTH:
            raise DataError(f"{self.prefix}: a document is longer than {MAX_LENGTH} tokens or bytes; split it")
        self._stream.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.extend(lengths)
        self._bytes.extend(num_bytes)
        self.num_tokens += int(tokens.size)
        self.num_bytes += sum(num_bytes)

    def finalize(self, meta: DatasetMeta | None = None) -> None:
        """Writes the index (and, with `meta`, the sidecars), syncs everything and renames it, the index last.

        Raises DataError without any document, OSError from the disk; the dataset that was there before then stays.
        """
        if self._stream is None:
            raise ValueError("the dataset is already finished")
        if not self._lengths:
            raise DataError(f"{self.prefix}: no document was added, and an empty dataset cannot be read; add one")
        _close(self._stream)
        self._write_index()
        if meta is not None:
            self._write(".bytes", np.frombuffer(self._bytes, dtype=np.uint32).astype("<u4").tobytes())
            self._write(".meta.json", (json.dumps(asdict(meta), indent=2) + "\n").encode())
        # From here on the old files go: first the old index, so that it never stands beside a new .bin.
        self._files[".idx"].unlink(missing_ok=True)
        for suffix in (".bytes", ".meta.json"):
            if suffix not in self._temporary:
                # where it is a link, the link: one to nothing would be taken for a damaged file
                dataset_file(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in _SUFFIXES:
            if suffix in self._temporary:
                os.replace(self._temporary.pop(suffix), self._files[suffix])
        for folder in {file.parent for file in self._files.values()}:
            sync_directory(folder)
        self._stream = None
        os.close(self._lock)

    def abort(self) -> None:
        """Removes what was written so far; nothing to do after `finalize`."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            os.close(self._lock)
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        self._temporary.clear()

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32).astype("<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        stream = self._open(".idx")
        stream.write(HEADER.pack(MAGIC, 1, self._code, lengths.size, lengths.size + 1))
        stream.write(lengths.tobytes())
        stream.write(np.concatenate(([0], ends[:-1])).astype("<i8").tobytes())
        stream.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())
        _close(stream)

    def _write(self, suffix: str, content: bytes) -> None:
        stream = self._open(suffix)
        stream.write(content)
        _close(stream)

    def _open(self, suffix: str) -> BinaryIO:
        path = temporary_path(self._files[suffix])
        self._temporary[suffix] = path
        return open(path, "wb")


def _held_lock(stream: BinaryIO) -> int:
    """A descriptor that locks a file until it is closed, or its process ends in whatever way."""
    held = os.dup(stream.fileno())
    # a file system without locks: a later process may take this file for a leftover
    with contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def _file(prefix: str, suffix: str) -> Path:
    """Where a file of a dataset goes, behind symbolic links. Raises ConfigError for what cannot be replaced."""
    path = dataset_file(prefix, suffix)
    try:
        found = written_file(path)
    except OSError as error:
        raise ConfigError(f"--output {prefix}: {path}: {error.strerror}; give another name, as {prefix}-2") from None
    if found is None:
        raise ConfigError(f"--output {prefix}: {path} is a pipe or a device; give another name, as {prefix}-2")
    return found


def _clear_leftovers(prefix: str | Path, files: dict[str, Path]) -> None:
    """Removes the temporary files of processes that are gone. Raises ConfigError where one of them is not."""
    found = []
    for suffix, file in files.items():
        pattern = re.compile(re.escape(file.name) + r"\.tmp-(\d+)")
        others = file.parent.iterdir() if file.parent.is_dir() else ()
        found += [(suffix, match[1], other) for other in others if (match := pattern.fullmatch(other.name))]
    for suffix, process, other in found:
        if suffix == ".bin" and not _is_free(other):
            raise ConfigError(
                f"--output {prefix}: process {process} is writing this dataset; wait for it, or give another name, for "
                f"example {prefix}-2"
            )
    for _, _, other in found:
        other.unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
