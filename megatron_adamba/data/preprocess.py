"""Corpus to indexed datasets: documents are tokenized in chunks, by this process or by several workers.

Chunk i goes to worker i modulo their number, and results are fetched in the same order: the files do not depend on
how many workers there are.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adamba.config.rules import file_to_write, folder_to_write, in_range
from megatron_adamba.data.corpus import Read
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import split_documents
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import DatasetMeta, token_dtype
from megatron_adamba.data.tokenizer import Tokenizer, load_tokenizer
from megatron_adamba.errors import AdambaError, ConfigError, DataError

CHUNK_CHARACTERS = 1 << 19
CHUNK_DOCUMENTS = 1024
CHUNKS_AHEAD = 2
MOST_WORKERS = 512


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read and where to put it.

    `output` is a prefix, or with `split` the folder of `train` and `validation`. `tokenizer` and `inputs` are specs
    of `load_tokenizer` and `iterate_documents`.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    eod_token: str | None = None
    split_pattern: str | None = None
    split: bool = False
    validation_fraction: float = 0.05
    json_key: str = "text"
    workers: int = 1

    def check(self) -> None:
        """Raises ConfigError for a value that cannot work."""
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"--validation-fraction {self.validation_fraction}: a share between 0 and 1 is needed, e.g. 0.05"
            )
        if not self.split and (self.output.endswith("/") or Path(self.output).is_dir()):
            example = Path(self.output, "train")
            raise ConfigError(f"--output {self.output}: without --split it is a prefix, not a folder, e.g. {example}")
        if self.split:
            folder_to_write("--output", self.output)
        else:
            file_to_write("--output", self.output, "train")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: at least one worker is needed, e.g. 1")
        in_range("--workers", self.workers, 1, MOST_WORKERS)


@dataclass(frozen=True)
class EncodedChunk:
    """Tokens of some documents end to end (each closed by eod), and per document: tokens, bytes, is it held out."""

    tokens: np.ndarray
    lengths: list[int]
    num_bytes: list[int]
    held_out: list[bool]


Chunk = list[tuple[str, bool]]
"""Documents: text, is it held out."""


def preprocess(
    options: PreprocessOptions, read: Read = lambda num_bytes: None
) -> tuple[dict[str, DatasetMeta], LeftOut]:
    """Writes the dataset, or `train` and `validation`, and returns what each prefix holds and what was left out.

    Nothing gets its final name before the whole corpus is done.

    Raises:
        ConfigError, TokenizerError, DataError: see `PreprocessOptions`, `load_tokenizer`, `iterate_documents`; also
            where one side of a split stays empty.
        OSError: the disk.
    """
    options.check()
    tokenizer = _tokenizer(options)
    prefixes = [options.output]
    if options.split:
        prefixes = [str(Path(options.output, name)) for name in ("train", "validation")]
    left_out = LeftOut()
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        builders = [stack.enter_context(IndexedDatasetBuilder(prefix, dtype)) for prefix in prefixes]
        encoded = stack.enter_context(_encoder(options, tokenizer, _chunks(options, left_out, read)))
        for chunk in encoded:
            _add_chunk(builders, chunk)
        _refuse_empty_side(options, builders)
        metas = {builder.prefix: described(builder, tokenizer, " ".join(options.inputs)) for builder in builders}
        for builder in builders:
            builder.finalize(metas[builder.prefix])
    return metas, left_out


def _tokenizer(options: PreprocessOptions) -> Tokenizer:
    return load_tokenizer(options.tokenizer, options.eod_token, options.split_pattern, network=True)


def _chunks(options: PreprocessOptions, left_out: LeftOut, read: Read) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    fraction = options.validation_fraction if options.split else 0.0
    for document in split_documents(options.inputs, options.json_key, fraction, left_out, read):
        chunk.append(document)
        characters += len(document[0])
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> EncodedChunk:
    documents = tokenizer.encode_batch([text for text, _ in chunk])
    for ids in documents:
        ids.append(tokenizer.eod_id)
    lengths = [len(ids) for ids in documents]
    tokens = np.fromiter((token for ids in documents for token in ids), dtype=np.int32, count=sum(lengths))
    num_bytes = [len(text.encode("utf-8", errors="replace")) for text, _ in chunk]
    return EncodedChunk(tokens, lengths, num_bytes, [held_out for _, held_out in chunk])


def _add_chunk(builders: list[IndexedDatasetBuilder], chunk: EncodedChunk) -> None:
    held_out = np.array(chunk.held_out, dtype=bool)
    lengths, num_bytes = np.array(chunk.lengths), np.array(chunk.num_bytes)
    of_token = np.repeat(held_out, lengths)
    for side, builder in enumerate(builders):
        chosen = held_out == bool(side)
        builder.add_documents(
            chunk.tokens[of_token == bool(side)], lengths[chosen].tolist(), num_bytes[chosen].tolist()
        )


def _refuse_empty_side(options: PreprocessOptions, builders: list[IndexedDatasetBuilder]) -> None:
    for builder in builders:
        if builder.num_documents == 0:
            total = sum(other.num_documents for other in builders)
            raise DataError(
                f"--validation-fraction {options.validation_fraction} leaves {Path(builder.prefix).name} without a "
                f"document ({total} in all); use more documents or a share nearer 0.5, or leave --split out"
            )


def described(builder: IndexedDatasetBuilder, tokenizer: Tokenizer, source: str) -> DatasetMeta:
    """The sidecar of what a builder holds; source: where the texts come from."""
    return DatasetMeta(
        tokenizer_hash=tokenizer.hash,
        tokenizer_name=_printable(tokenizer.name),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        num_documents=builder.num_documents,
        num_tokens=builder.num_tokens,
        num_bytes=builder.num_bytes,
        source=_printable(source),
    )


def _printable(name: str) -> str:
    """A path need not be text; JSON has to be."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")


@contextmanager
def _encoder(
    options: PreprocessOptions, tokenizer: Tokenizer, chunks: Iterable[Chunk]
) -> Iterator[Iterator[EncodedChunk]]:
    """The encoded chunks in order; workers, if any, end with the block."""
    if options.workers == 1:
        yield (_encode_chunk(tokenizer, chunk) for chunk in chunks)
        return
    workers = [_Worker(options) for _ in range(options.workers)]
    try:
        yield _dispatch(workers, chunks)
    finally:
        for worker in workers:
            worker.stop()


def _dispatch(workers: list[_Worker], chunks: Iterable[Chunk]) -> Iterator[EncodedChunk]:
    waiting: deque[_Worker] = deque()
    for number, chunk in enumerate(chunks):
        worker = workers[number % len(workers)]
        worker.send(chunk)
        waiting.append(worker)
        if len(waiting) >= CHUNKS_AHEAD * len(workers):
            yield waiting.popleft().receive()
    while waiting:
        yield waiting.popleft().receive()


class _Worker:
    """A spawned process with a tokenizer of its own; it answers chunks in the order they were sent."""

    def __init__(self, options: PreprocessOptions) -> None:
        _start_tracker()
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches the whole group: who waits for the workers ends them, and they have nothing to say
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        self._chunks: Any = context.Queue()
        self._results: Any = context.Queue()
        self._process = context.Process(target=_work, args=(options, self._chunks, self._results), daemon=True)
        try:
            self._process.start()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def send(self, chunk: Chunk) -> None:
        self._chunks.put(chunk)

    def receive(self) -> EncodedChunk:
        """The next result. Raises what the worker raised, and DataError if it died."""
        while True:
            alive = self._process.is_alive()
            try:
                result = self._results.get(timeout=1.0 if alive else 0.1)
            except queue.Empty:
                if alive:
                    continue
                raise DataError(
                    f"a worker died (exit code {self._process.exitcode}), perhaps for lack of memory; "
                    "use fewer --workers, e.g. 1"
                ) from None
            if isinstance(result, BaseException):
                raise result
            return result

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        for channel in (self._chunks, self._results):
            channel.cancel_join_thread()
            channel.close()


def _start_tracker() -> None:
    """Python's own process that clears semaphores away: a signal to the whole group must not end it before us. What is
    blocked here stays blocked in it; of SIGINT and SIGTERM it takes care itself."""
    ending = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_with_parent() -> None:
    """A parent that was killed sends nothing more and ends nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(options: PreprocessOptions, chunks: Any, results: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tokenizer = _tokenizer(options)
        while True:
            results.put(_encode_chunk(tokenizer, chunks.get()))
    except AdambaError as error:
        results.put(error)
    except KeyboardInterrupt:
        return
