"""Packing: what a sample holds, by a slow description of the same thing."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.packed import UNSCORED, PackedDataset, Sample, evaluation_batches
from megatron_adamba.errors import DataError

EOD = 0

# (tokens before the end, does an eod close it): one-token documents are (0, True) and (1, False)
SHAPES = st.lists(
    st.tuples(st.integers(0, 12), st.booleans()).filter(lambda shape: shape[0] or shape[1]), min_size=1, max_size=12
)
CLOSED_SHAPES = st.lists(st.tuples(st.integers(0, 12), st.just(True)), min_size=1, max_size=12)


def make_documents(shapes: list[tuple[int, bool]]) -> list[list[int]]:
    """Documents whose tokens other than eod are all different."""
    documents, following = [], 1
    for length, closed in shapes:
        documents.append([*range(following, following + length), *([EOD] if closed else [])])
        following += length
    return documents


def write(folder: Path, documents: list[list[int]]) -> IndexedDataset:
    return write_dataset(folder / "d", documents, num_bytes=[len(document) for document in documents])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def describe(documents: list[list[int]], seq_len: int, padded: bool = False) -> list[tuple[list, list, list]]:
    """(tokens, labels, seq_idx) of every window of these documents in this order, a token at a time."""
    stream = [(EOD, None)] + [(token, place) for place, document in enumerate(documents) for token in document]
    inputs = []
    for (token, document), (target, following) in pairwise(stream):
        crosses = document != following
        opens = crosses and token == EOD
        inputs.append((token, UNSCORED if crosses and not opens else target, following if opens else document))
    windows = [inputs[start : start + seq_len] for start in range(0, len(inputs), seq_len)]
    if len(windows[-1]) < seq_len:
        tail = windows.pop()
        if padded:
            windows.append(tail + [(EOD, UNSCORED, tail[-1][2])] * (seq_len - len(tail)))
    described = []
    for window in windows:
        tokens, labels, owners = (list(column) for column in zip(*window))
        distinct = list(dict.fromkeys(owners))
        described.append((tokens, labels, [distinct.index(owner) for owner in owners]))
    return described


def as_lists(sample: Sample) -> tuple[list, list, list]:
    return sample["tokens"].tolist(), sample["labels"].tolist(), sample["seq_idx"].tolist()


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, seq_len=st.integers(1, 9))
def test_unshuffled_samples_are_as_described(folder: Path, shapes: list, seq_len: int):
    documents = make_documents(shapes)
    indexed = write(folder, documents)
    expected = describe(documents, seq_len)
    if not expected:
        with pytest.raises(DataError, match=f"at least {seq_len}"):
            PackedDataset(indexed, seq_len, 0, EOD)
        return
    dataset = PackedDataset(indexed, seq_len, 0, EOD, shuffle=False)
    assert dataset.samples_per_epoch == len(expected)
    for index in range(2 * len(expected)):
        sample = dataset[index]
        assert as_lists(sample) == expected[index % len(expected)]
        assert [sample[name].dtype for name in ("tokens", "labels", "seq_idx")] == [np.int64, np.int64, np.int32]


@settings(max_examples=80, deadline=None)
@given(shapes=CLOSED_SHAPES, seq_len=st.integers(1, 9), seed=st.integers(0, 2**64), epoch=st.integers(0, 3))
def test_an_epoch_scores_every_token_but_the_tail_once(folder: Path, shapes: list, seq_len: int, seed: int, epoch: int):
    documents = make_documents(shapes)
    total = sum(map(len, documents))
    indexed = write(folder, documents)
    if total < seq_len:
        return
    dataset = PackedDataset(indexed, seq_len, seed, EOD)
    count = dataset.samples_per_epoch
    samples = [dataset[index] for index in range(epoch * count, (epoch + 1) * count)]
    labels = np.concatenate([sample["labels"] for sample in samples])
    assert labels.size == total - total % seq_len and UNSCORED not in labels
    scored, stored = Counter(labels.tolist()), Counter(token for document in documents for token in document)
    assert scored <= stored

    following = {token: target for document in documents for token, target in pairwise(document)}
    firsts = {document[0] for document in documents}
    for sample in samples:
        tokens, targets, seq_idx = as_lists(sample)
        opens = [token == EOD for token in tokens]
        for token, target in zip(tokens, targets):
            assert target in firsts if token == EOD else target == following[token]
        assert seq_idx == (np.cumsum(opens) - int(opens[0])).tolist()


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, seq_len=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_a_sample_is_a_pure_function_of_seed_and_index(folder: Path, shapes: list, seq_len: int, order):
    documents = make_documents(shapes)
    indexed = write(folder, documents)
    if indexed.num_tokens < seq_len:
        return
    first = PackedDataset(indexed, seq_len, 7, EOD)
    indices = list(range(5 * first.samples_per_epoch))
    expected = [as_lists(first[index]) for index in indices]
    order.shuffle(indices)
    other = PackedDataset(indexed, seq_len, 7, EOD)
    assert all(as_lists(other[index]) == expected[index] for index in indices)


def test_samples_never_change(tmp_path: Path):
    """The order of a run that resumes under a later version: these numbers were written down once."""
    indexed = write(tmp_path, make_documents([(length, True) for length in (3, 1, 4, 1, 5, 9, 2, 6)]))
    dataset = PackedDataset(indexed, 4, 1234, EOD)
    assert [dataset[index]["labels"].tolist() for index in (0, 1, 9, 100)] == FROZEN


FROZEN = [[4, 0, 26, 27], [19, 20, 21, 22], [23, 0, 1, 2], [7, 8, 0, 1]]


def test_seeds_and_epochs_differ(tmp_path: Path):
    indexed = write(tmp_path, make_documents([(5, True)] * 60))
    dataset, other = PackedDataset(indexed, 6, 1, EOD), PackedDataset(indexed, 6, 2, EOD)
    orders = [
        [source[start + place]["labels"][0] for place in range(60)]
        for source, start in ((dataset, 0), (dataset, 60), (other, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert len(set(order)) == 60 and order != sorted(order)


def test_no_more_than_two_epochs_are_kept(tmp_path: Path):
    dataset = PackedDataset(write(tmp_path, make_documents([(5, True)] * 4)), 6, 1, EOD)
    for index in (0, 4, 8, 80, 3, 81):
        _ = dataset[index]
    assert list(dataset._epochs) == [0, 20]


def test_documents_of_no_token_do_not_count(tmp_path: Path):
    indexed = write_dataset(tmp_path / "d", [[], [1, 0], [], [], [2, 0], []])
    sample = PackedDataset(indexed, 4, 0, EOD, shuffle=False)[0]
    assert as_lists(sample) == ([0, 1, 0, 2], [1, 0, 2, 0], [0, 0, 1, 1])
    assert evaluation_batches(indexed, 4, 1, EOD).num_tokens == 4


def test_too_short_names_the_flag_and_a_value_that_works(tmp_path: Path):
    indexed = write(tmp_path, [[1, 2, 0]])
    with pytest.raises(DataError, match=r"at least 4 are needed; add data or use --train\.seq_len 3"):
        PackedDataset(indexed, 4, 0, EOD)
    assert PackedDataset(indexed, 3, 0, EOD)[5]["labels"].tolist() == [1, 2, 0]
    with pytest.raises(IndexError):
        PackedDataset(indexed, 3, 0, EOD)[-1]


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path):
    indexed = write(tmp_path, [[1, 9, 0]])
    indexed.vocab_size = 9
    with pytest.raises(DataError, match="token id 9 is outside the vocabulary of 9"):
        PackedDataset(indexed, 3, 0, EOD)[0]


def test_many_documents_are_no_python_loop(tmp_path: Path):
    prefix, count = tmp_path / "many", 2_000_000
    from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder

    with IndexedDatasetBuilder(prefix, "<u2") as builder:
        builder.add_documents(np.tile([7, 0], count), [2] * count, [1] * count)
        builder.finalize()
    started = time.perf_counter()
    dataset = PackedDataset(IndexedDataset(prefix), 512, 0, EOD)
    sample = dataset[3 * dataset.samples_per_epoch]
    assert time.perf_counter() - started < 3
    assert sample["seq_idx"][-1] == 256 - (sample["tokens"][0] == EOD)


@settings(max_examples=80, deadline=None)
@given(shapes=SHAPES, seq_len=st.integers(1, 9), batch_size=st.integers(1, 4), limit=st.none() | st.integers(1, 60))
def test_evaluation_is_as_described(folder: Path, shapes: list, seq_len: int, batch_size: int, limit: int | None):
    documents = make_documents(shapes)
    indexed = write(folder, documents)
    batches = evaluation_batches(indexed, seq_len, batch_size, EOD, max_tokens=limit)
    whole, documents, left = documents, [], limit if limit is not None else sum(map(len, documents))
    for document in whole:
        if left > 0:
            documents.append(document[:left])
            left -= len(document)
    expected = describe(documents, seq_len, padded=True)
    rows = [row for batch in batches for row in zip(*(batch[name] for name in ("tokens", "labels", "seq_idx")))]
    assert [tuple(values.tolist() for values in row) for row in rows] == expected
    assert len(batches) == -(-len(expected) // batch_size) == len(list(batches))
    labels = np.concatenate([row[1] for row in rows])
    assert batches.num_documents == len(documents)
    assert batches.num_tokens == np.count_nonzero(labels != UNSCORED)
    assert batches.num_bytes == sum(map(len, documents))
    if all(closed for _, closed in shapes):
        tokens = [token for document in documents for token in document]
        assert labels[labels != UNSCORED].tolist() == tokens


def test_evaluation_bytes_without_sidecars(tmp_path: Path):
    documents = make_documents([(3, True), (3, True), (7, True)])
    write_dataset(tmp_path / "d", documents, num_bytes=[30, 50, 80])
    (tmp_path / "d.bytes").unlink()
    assert evaluation_batches(IndexedDataset(tmp_path / "d"), 4, 2, EOD).num_bytes == 160
    assert evaluation_batches(IndexedDataset(tmp_path / "d"), 4, 2, EOD, max_tokens=9).num_bytes == 90
    (tmp_path / "d.meta.json").unlink()
    batches = evaluation_batches(IndexedDataset(tmp_path / "d"), 4, 2, EOD)
    assert batches.num_bytes is None
    with pytest.raises(IndexError):
        batches[len(batches)]
