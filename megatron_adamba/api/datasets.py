"""Datasets and tokenizers: Megatron's `.bin` and `.idx`, made and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from megatron_adamba.api.wording import naming_arguments
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import DatasetMeta, IndexedDataset, token_dtype
from megatron_adamba.data.preprocess import described
from megatron_adamba.data.sentencepiece_training import train_sentencepiece
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.data.tokenizer import load_tokenizer as _load_tokenizer
from megatron_adamba.data.tokenizer_options import TokenizerFlags
from megatron_adamba.errors import DataError


class Dataset(Sequence[np.ndarray]):
    """Documents as token ids, memory-mapped; `open_dataset` makes one."""

    def __init__(self, indexed: IndexedDataset) -> None:
        self._indexed = indexed

    def __len__(self) -> int:
        """Documents."""
        return self._indexed.num_documents

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, place: slice) -> list[np.ndarray]: ...

    def __getitem__(self, place: int | slice) -> np.ndarray | list[np.ndarray]:
        """Token ids of a document, [n] int64, its end-of-document token last; of a slice a list of them."""
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index = range(len(self))[place]
        return np.asarray(self._indexed.document(index), dtype=np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(len(self)))

    @property
    def num_tokens(self) -> int:
        return self._indexed.num_tokens

    @property
    def meta(self) -> DatasetMeta | None:
        """What `write_dataset` and `adamba data` note beside a dataset; None where others made it."""
        return self._indexed.meta


@naming_arguments
def open_dataset(prefix: str | Path) -> Dataset:
    """prefix: of PREFIX.bin and PREFIX.idx, Megatron's own or ours. Raises DataError."""
    return Dataset(IndexedDataset(Path(prefix)))


@naming_arguments
def write_dataset(texts: Iterable[str], prefix: str | Path, tokenizer: Tokenizer) -> Dataset:
    """Tokenizes texts, a document each, into PREFIX.bin and PREFIX.idx; nothing has its name before all is written.

    Raises DataError where there is no text, OSError of the disk.
    """
    with IndexedDatasetBuilder(str(prefix), token_dtype(tokenizer.vocab_size)) as builder:
        for text in texts:
            if text:
                ids = [*tokenizer.encode(text), tokenizer.eod_id]
                builder.add_documents(np.array(ids), [len(ids)], [len(text.encode("utf-8", errors="replace"))])
        if not builder.num_documents:
            raise DataError("texts: there is none that is not empty")
        builder.finalize(described(builder, tokenizer, "write_dataset"))
    return open_dataset(prefix)


@naming_arguments
def load_tokenizer(
    tokenizer: str | Path, *, eod_token: str | None = None, split_pattern: str | None = None
) -> Tokenizer:
    """A tokenizer by what names it.

    Args:
        tokenizer: bytes, FILE.model, tokenizer.json, FILE.tiktoken, tiktoken:NAME, or a folder.
        eod_token: the end-of-document token by name, where it is none of the usual ones.
        split_pattern: of a FILE.tiktoken: the encoding that it was made with, or a regular expression.

    Raises TokenizerError.
    """
    flags = TokenizerFlags("tokenizer", "eod_token", "split_pattern")
    return _load_tokenizer(str(tokenizer), eod_token, split_pattern, flags=flags)


@naming_arguments
def train_tokenizer(texts: Iterable[str], file: str | Path, *, vocab_size: int = 4096) -> Tokenizer:
    """Trains a lossless sentencepiece tokenizer (BPE with byte fallback) and writes it.

    Args:
        texts: read once; a sample of a larger corpus is used.
        file: to write; its name ends in .model.
        vocab_size: pieces in all, 256 bytes among them.

    Raises ConfigError, DataError.
    """
    return train_sentencepiece(texts, vocab_size, file)
