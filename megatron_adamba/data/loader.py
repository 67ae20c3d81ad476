"""Samples as torch tensors, a micro-batch at a time, read ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from megatron_adamba.data.blend import SampleSource
from megatron_adamba.data.packed import Sample


class MicroBatch(TypedDict):
    """Tensors [batch, seq] on the CPU."""

    tokens: Tensor
    """int64, as labels"""
    labels: Tensor
    seq_idx: Tensor
    """int32"""
    packed: bool
    """whether any row holds more than one document (known on the host, so that nothing waits for a device)"""


class ModelInputs(TypedDict):
    """Of a micro-batch, on the device."""

    tokens: Tensor
    labels: Tensor
    seq_idx: Tensor | None
    """None where no row holds more than one document"""


def model_inputs(batch: MicroBatch, device: torch.device) -> ModelInputs:
    """Nothing waits for the copies."""
    move = lambda tensor: tensor.to(device, non_blocking=True)
    seq_idx = move(batch["seq_idx"]) if batch["packed"] else None
    return {"tokens": move(batch["tokens"]), "labels": move(batch["labels"]), "seq_idx": seq_idx}


def to_micro_batch(batch: Sample) -> MicroBatch:
    """Tensors of a sample whose arrays have a leading batch dimension, as `EvaluationBatches` yields them."""
    tokens, labels, seq_idx = (torch.from_numpy(batch[name]) for name in ("tokens", "labels", "seq_idx"))
    return {"tokens": tokens, "labels": labels, "seq_idx": seq_idx, "packed": bool(batch["seq_idx"].any())}


def load_micro_batch(dataset: SampleSource, first_sample: int, micro_batch_size: int) -> MicroBatch:
    """Samples first_sample to first_sample + micro_batch_size - 1 of `dataset`."""
    rows = [dataset[first_sample + place] for place in range(micro_batch_size)]
    return to_micro_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _pinned(batch: MicroBatch) -> MicroBatch:
    tokens, labels, seq_idx = (tensor.pin_memory() for tensor in (batch["tokens"], batch["labels"], batch["seq_idx"]))
    return {"tokens": tokens, "labels": labels, "seq_idx": seq_idx, "packed": batch["packed"]}


class MicroBatchLoader:
    """Iterates over micro-batches n = start, start + 1, ..., each read ahead of its use by one background thread.

    Micro-batch n holds the samples from `first_sample_of(n)` on, so it is a pure function of n. A failure in the
    thread is raised by `next` in the caller's thread, after the micro-batches before it. Use it as a context manager,
    or call `close`.
    """

    def __init__(
        self,
        dataset: SampleSource,
        micro_batch_size: int,
        first_sample_of: Callable[[int], int],
        start: int = 0,
        stop: int | None = None,
        depth: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Args: stop: number of the micro-batch to end before (None: endless); depth: micro-batches held ready."""
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._first_sample_of = first_sample_of
        self._numbers = (start, stop)
        self._pin_memory = pin_memory
        self._queue: queue.Queue[MicroBatch | BaseException] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="micro-batch-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._closing.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and waits for it; safe to call twice."""
        self._closing.set()
        while self._thread.is_alive():
            # A full queue holds the thread in `put`.
            self._drain()
            self._thread.join(timeout=0.05)
        self._drain()

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return

    def _read_ahead(self) -> None:
        number, stop = self._numbers
        try:
            while not self._closing.is_set() and (stop is None or number < stop):
                batch = load_micro_batch(self._dataset, self._first_sample_of(number), self._micro_batch_size)
                if self._pin_memory:
                    batch = _pinned(batch)
                self._queue.put(batch)
                number += 1
            last: BaseException = StopIteration()
        except BaseException as error:
            last = error
        if not self._closing.is_set():
            self._queue.put(last)
