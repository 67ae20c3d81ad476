"""Blends, datasets from flags, and micro-batches read ahead."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adamba.data.blend import PERIOD, BlendedDataset, build_dataset, parse_data_paths
from megatron_adamba.data.loader import MicroBatchLoader, load_micro_batch, to_micro_batch
from megatron_adamba.data.packed import PackedDataset, Sample, evaluation_batches
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.errors import ConfigError, DataError, TokenizerError


class Named:
    """Samples that say where they came from."""

    def __init__(self, name: int) -> None:
        self.name = name

    def __getitem__(self, index: int) -> Sample:
        return {
            "tokens": np.array([self.name, index]),
            "labels": np.array([0, 0]),
            "seq_idx": np.array([0, index % 2], dtype=np.int32),
        }


class Broken(Named):
    def __getitem__(self, index: int) -> Sample:
        if index >= 3:
            raise DataError("sample 3 is broken")
        return super().__getitem__(index)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
def test_blend_takes_the_largest_deficit(weights: list[float]):
    blend = BlendedDataset([Named(place) for place in range(len(weights))], weights)
    assert sum(blend.units) == PERIOD
    exact = [Fraction(unit, PERIOD) for unit in blend.units]
    assert all(abs(float(share) - weight / sum(weights)) < 2e-6 for share, weight in zip(exact, weights))
    counts = [0] * len(weights)
    for index in range(60):
        deficits = [share * (index + 1) - count for share, count in zip(exact, counts)]
        chosen = deficits.index(max(deficits))
        assert blend.locate(index) == (chosen, counts[chosen])
        assert blend[index]["tokens"].tolist() == [chosen, counts[chosen]]
        counts[chosen] += 1


def test_blend_goes_on_past_its_period_and_from_anywhere():
    weights = [0.7, 0.2, 0.1]
    blend = BlendedDataset([Named(0), Named(1), Named(2)], weights)
    late = [blend.locate(index) for index in range(PERIOD - 500, PERIOD + 500)]
    other = BlendedDataset([Named(0), Named(1), Named(2)], weights)
    next_index = [0, 0, 0]
    for index in range(PERIOD + 500):
        if index == PERIOD:
            assert next_index == other.units
        dataset, inner = other.locate(index)
        assert inner == next_index[dataset]  # no sample of any dataset is left out or repeated
        next_index[dataset] += 1
        if index >= PERIOD - 500:
            assert late[index - PERIOD + 500] == (dataset, inner)
    far = 10**12
    dataset, inner = blend.locate(far)
    assert abs(inner - far * weights[dataset]) < 10**7


def test_a_tiny_weight_still_gets_samples():
    blend = BlendedDataset([Named(0), Named(1)], [1.0, 1e-12])
    assert blend.units == [PERIOD - 1, 1]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights(weights: list[float]):
    with pytest.raises(ConfigError):
        BlendedDataset([Named(0), Named(1)], weights)


def test_paths_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert parse_data_paths(["a"]) == [(None, "a")]
    assert parse_data_paths(["a", "b"]) == [(None, "a"), (None, "b")]
    assert parse_data_paths(["0.7", "a", "3", "b"]) == [(0.7, "a"), (3.0, "b")]
    for bad in ([], ["0.7"], ["0.7", "a", "b"], ["0.7", "a", "b", "0.3"], ["0", "a"], ["nan", "a"], ["-1", "a"]):
        with pytest.raises(ConfigError, match=r"e\.g\. --data\.train 0\.7 data/a"):
            parse_data_paths(bad)
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "7", [[1, 0]])
    assert parse_data_paths(["7"]) == [(None, "7")]


def byte_dataset(prefix: Path, text: str, **meta: object) -> Path:
    tokenizer = ByteTokenizer()
    known = {"tokenizer_hash": tokenizer.hash, "tokenizer_name": "bytes", "eod_id": 256, "vocab_size": 257}
    write_dataset(prefix, [[*text.encode(), 256]] * 8, num_bytes=[len(text)] * 8, **{**known, **meta})
    return prefix


def test_build_dataset(tmp_path: Path):
    one = str(byte_dataset(tmp_path / "one", "aaa"))
    two = str(byte_dataset(tmp_path / "two", "b" * 11))
    single = build_dataset([one], 4, 5, ByteTokenizer())
    assert isinstance(single, PackedDataset) and single[0]["labels"].tolist() == [97, 97, 97, 256]
    blend = build_dataset(["0.25", one, "0.75", two], 4, 5, None)
    letters = ["ab"[98 in blend[index]["labels"]] for index in range(400)]
    assert letters.count("a") == 100
    by_size = build_dataset([one, two], 4, 5, ByteTokenizer())
    assert isinstance(by_size, BlendedDataset) and by_size.units == [PERIOD // 4, 3 * PERIOD // 4]


def test_build_dataset_refusals(tmp_path: Path):
    other = str(byte_dataset(tmp_path / "other", "aaa", tokenizer_hash="f" * 64, tokenizer_name="theirs"))
    with pytest.raises(TokenizerError, match="made with tokenizer theirs"):
        build_dataset([other], 4, 5, ByteTokenizer())
    closed = str(byte_dataset(tmp_path / "closed", "aaa", eod_id=255))
    with pytest.raises(TokenizerError, match="documents end in token 255"):
        build_dataset([closed], 4, 5, ByteTokenizer())
    foreign = tmp_path / "foreign"
    write_dataset(foreign, [[1, 2, 3, 300]], dtype="<i4")
    with pytest.raises(DataError, match=r"give --data\.tokenizer"):
        build_dataset([str(foreign)], 4, 5, None)
    with pytest.raises(DataError, match="token id 300"):
        build_dataset([str(foreign)], 4, 5, ByteTokenizer())[0]
    with pytest.raises(DataError, match="no such file"):
        build_dataset([str(tmp_path / "missing")], 4, 5, ByteTokenizer())


def test_micro_batch():
    batch = load_micro_batch(Named(3), 6, 2)
    assert batch["tokens"].tolist() == [[3, 6], [3, 7]] and batch["packed"] is True
    assert batch["tokens"].dtype == torch.int64 and batch["seq_idx"].dtype == torch.int32
    assert load_micro_batch(Named(3), 6, 1)["packed"] is False


def test_evaluation_batches_as_tensors(tmp_path: Path):
    indexed = write_dataset(tmp_path / "d", [[1, 2, 0], [3, 0]])
    batch = to_micro_batch(evaluation_batches(indexed, 3, 4, 0)[0])
    assert batch["labels"].tolist() == [[1, 2, 0], [3, 0, -100]] and batch["packed"] is False


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "micro-batch-loader"]


def test_loader_follows_the_callable_and_ends():
    with MicroBatchLoader(Named(0), 2, lambda number: 10 * number, start=3, stop=6) as loader:
        firsts = [batch["tokens"][0, 1].item() for batch in loader]
        assert firsts == [30, 40, 50]
        assert next(loader, None) is None
    assert not loader_threads()


def test_loader_raises_where_the_batch_was_asked_for():
    loader = MicroBatchLoader(Broken(0), 1, lambda number: number)
    assert [next(loader)["tokens"][0, 1].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="sample 3 is broken"):
        next(loader)
    assert not loader_threads()
    assert next(loader, None) is None


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_loader_closes_at_any_time(taken: int):
    loader = MicroBatchLoader(Named(0), 1, lambda number: number, depth=1)
    for _ in range(taken):
        next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
