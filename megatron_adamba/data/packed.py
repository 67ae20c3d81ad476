"""Training samples cut from a stream of documents, and the same cut for evaluation.

The stream of an epoch is one end-of-document token (eod) and then all documents, each closed by its own. As an input
the eod before a document opens it; as a target the eod after it closes it: every token of a document, the first too,
is predicted from that document alone. Where the data of others does not close documents, a document begins with its
first token, and the position before it has no target.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.errors import DataError

UNSCORED = -100
DOCUMENT_ORDER, WINDOW_ORDER = 1, 2
EPOCHS_KEPT = 2

Sample = dict[str, np.ndarray]
"""int64 `tokens` [seq], int64 `labels` [seq] (-100: no target), int32 `seq_idx` [seq] (documents from 0 on)."""


@dataclass(frozen=True)
class DocumentStream:
    """Documents in some order: `sources` [n] is where each begins in the dataset, `bounds` [n + 1] where each begins
    in the stream without its leading eod (both int64, in tokens)."""

    sources: np.ndarray
    bounds: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def read(self, dataset: IndexedDataset, start: int, stop: int, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start to stop of the stream and the place of each one's document in it (-1: the leading eod)."""
        positions = np.arange(max(start, 1) - 1, stop - 1)
        documents = np.empty(0, dtype=np.int64)
        if positions.size:
            first = int(np.searchsorted(self.bounds, positions[0], side="right")) - 1
            last = int(np.searchsorted(self.bounds, positions[-1], side="right"))
            documents = first + np.searchsorted(self.bounds[first : last + 1], positions, side="right") - 1
        tokens = dataset.gather(self.sources[documents] + positions - self.bounds[documents])
        if start == 0:
            tokens, documents = np.insert(tokens, 0, eod_id), np.insert(documents, 0, -1)
        return tokens, documents


def make_sample(tokens: np.ndarray, documents: np.ndarray, eod_id: int) -> Sample:
    """The sample of `seq + 1` consecutive tokens (int64) of a stream and their documents (int64, non-decreasing)."""
    closes = documents[:-1] != documents[1:]
    opens_next = closes & (tokens[:-1] == eod_id)
    owners = np.where(opens_next, documents[1:], documents[:-1])
    seq_idx = np.zeros(owners.size, dtype=np.int32)
    np.cumsum(owners[1:] != owners[:-1], out=seq_idx[1:])
    labels = np.where(closes & ~opens_next, UNSCORED, tokens[1:])
    return {"tokens": tokens[:-1].copy(), "labels": labels, "seq_idx": seq_idx}


class PackedDataset:
    """Endless training samples: sample g is a pure function of (seed, g).

    Each epoch permutes the documents, cuts their stream into windows of `seq_len`, drops the ragged tail, and visits
    the windows in an order of its own. Both orders come from Philox counters keyed by the seed, and sorting raw
    draws, which numpy promises never to change. An epoch takes 16 bytes per document and 4 per window of memory, and
    at most two epochs are kept. Reading from several threads is safe.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        seed: int,
        eod_id: int,
        shuffle: bool = True,
    ) -> None:
        """Raises DataError: too few tokens."""
        self.indexed = indexed
        self.seq_len = seq_len
        self.seed = seed
        self.eod_id = eod_id
        self.shuffle = shuffle
        self.samples_per_epoch = indexed.num_tokens // seq_len
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{indexed.prefix}: {indexed.num_tokens} tokens are less than one sample, at least {seq_len} are "
                f"needed; add data or use --train.seq_len {indexed.num_tokens}"
            )
        self._epochs: OrderedDict[int, tuple[DocumentStream, np.ndarray | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` (any int from 0 on). Raises DataError for a token id outside the dataset's vocabulary."""
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, place = divmod(int(index), self.samples_per_epoch)
        stream, order = self._epoch(epoch)
        start = (place if order is None else int(order[place])) * self.seq_len
        tokens, documents = stream.read(self.indexed, start, start + self.seq_len + 1, self.eod_id)
        return make_sample(tokens, documents, self.eod_id)

    def _epoch(self, epoch: int) -> tuple[DocumentStream, np.ndarray | None]:
        key = epoch if self.shuffle else 0
        with self._lock:
            if key not in self._epochs:
                while len(self._epochs) >= EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
                self._epochs[key] = self._build_epoch(key)
            self._epochs.move_to_end(key)
            return self._epochs[key]

    def _build_epoch(self, epoch: int) -> tuple[DocumentStream, np.ndarray | None]:
        offsets = self.indexed.document_offsets
        if not self.shuffle:
            return DocumentStream(offsets[:-1], offsets), None
        order = _permutation(self.indexed.num_documents, self.seed, DOCUMENT_ORDER, epoch)
        bounds = np.zeros(order.size + 1, dtype=np.int64)
        np.cumsum(np.diff(offsets)[order], out=bounds[1:])
        windows = _permutation(self.samples_per_epoch, self.seed, WINDOW_ORDER, epoch)
        return DocumentStream(offsets[order], bounds), windows


def _permutation(size: int, seed: int, purpose: int, epoch: int) -> np.ndarray:
    """int64 or int32 [size]; a function of the arguments alone."""
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([0, 0, epoch, 0], dtype=np.uint64))
    order = np.argsort(generator.random_raw(size), kind="stable")
    return order.astype(np.int32) if size < 2**31 else order


class EvaluationBatches:
    """Every token of documents in stored order, or the first so many, each scored once: a sequence of batches.

    A batch is a `Sample` with a leading batch dimension; the last one may have fewer rows, and its last row is padded
    with eod tokens that have no target.

    Attributes:
        num_documents, num_tokens: what is scored (the eod of each document included; of documents that nothing
            closes, the first token is not). A limit may cut the last document.
        num_bytes: UTF-8 bytes of the scored tokens, for bits per byte. Exact with PREFIX.bytes for whole documents;
            without it, and for a document that is cut, proportional to the tokens; None without a sidecar.

    Raises DataError for a token id outside the dataset's vocabulary.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        batch_size: int,
        eod_id: int,
        max_tokens: int | None = None,
    ) -> None:
        self._indexed = indexed
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._eod_id = eod_id
        offsets = indexed.document_offsets
        self.num_documents, self._end = indexed.num_documents, int(offsets[-1])
        if max_tokens is not None:
            self._end = min(self._end, max(1, max_tokens))
            self.num_documents = int(np.searchsorted(offsets, self._end, side="left"))
        bounds = offsets[: self.num_documents + 1]
        # now, and not when a run has trained and evaluates at last
        indexed.check_ids(int(bounds[-1]))
        self._stream = DocumentStream(bounds[:-1], bounds)
        inner = np.unique(bounds[(bounds > 0) & (bounds < self._end)])
        self.num_tokens = self._end - int(np.count_nonzero(indexed.gather(inner - 1) != eod_id))
        self.num_bytes = self._count_bytes()

    def __len__(self) -> int:
        return -(-self._num_windows // self._batch_size)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self._batch_size
        rows = [self._row(window) for window in range(first, min(first + self._batch_size, self._num_windows))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def _num_windows(self) -> int:
        return -(-self._end // self._seq_len)

    def _row(self, window: int) -> Sample:
        start = window * self._seq_len
        stop = min(start + self._seq_len, self._end)
        tokens, documents = self._stream.read(self._indexed, start, stop + 1, self._eod_id)
        sample = make_sample(tokens, documents, self._eod_id)
        missing = self._seq_len - sample["tokens"].size
        fills = {"tokens": self._eod_id, "labels": UNSCORED, "seq_idx": sample["seq_idx"][-1]}
        return {name: np.pad(values, (0, missing), constant_values=fills[name]) for name, values in sample.items()}

    def _count_bytes(self) -> int | None:
        per_document, meta = self._indexed.document_bytes, self._indexed.meta
        if per_document is not None and self.num_documents:
            first, after = (int(place) for place in self._stream.bounds[-2:])
            whole = int(per_document[: self.num_documents - 1].sum(dtype=np.int64))
            last = int(per_document[self.num_documents - 1])
            return whole + round(last * (self._end - first) / max(after - first, 1))
        if meta is None:
            return None
        return round(meta.num_bytes * self._end / max(self._indexed.num_tokens, 1))


def evaluation_batches(
    indexed: IndexedDataset, seq_len: int, batch_size: int, eod_id: int, max_tokens: int | None = None
) -> EvaluationBatches:
    """Batches that score every token of `indexed` once, or its first `max_tokens`."""
    return EvaluationBatches(indexed, seq_len, batch_size, eod_id, max_tokens)
