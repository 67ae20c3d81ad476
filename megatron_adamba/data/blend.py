"""Several datasets as one, in given proportions, and the training dataset of a run from its flags."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from megatron_adamba.data.indexed_dataset import IndexedDataset, dataset_file
from megatron_adamba.data.packed import PackedDataset, Sample
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.data.tokenizer_options import RUN_FLAGS
from megatron_adamba.errors import ConfigError, DataError, TokenizerError

PERIOD = 1 << 20
CHUNK = 1 << 15


class SampleSource(Protocol):
    """Anything with endless samples that are a pure function of their index."""

    def __getitem__(self, index: int) -> Sample: ...


Source = TypeVar("Source", bound=SampleSource)


class BlendedDataset(Generic[Source]):
    """Endless samples of several datasets: each sample comes from the one that lags furthest behind its weight.

    Weights are rounded to 1/2^20. The pattern is then exact in integers, repeats after 2^20 samples, and needs no
    more memory or time for late samples than for early ones; it does not depend on the length of the run.
    """

    def __init__(self, datasets: Sequence[Source], weights: Sequence[float]) -> None:
        """Args: weights: one positive, finite number per dataset, of any sum. Raises ConfigError."""
        if not datasets or len(datasets) != len(weights):
            raise ConfigError(f"a blend of {len(datasets)} datasets needs as many weights, not {len(weights)}")
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"--data.train: the weight {weight} of a blend must be positive, e.g. 0.5")
        self.datasets = list(datasets)
        self.units = _whole_units(weights, PERIOD)
        self._choices = np.empty(0, dtype=np.int32)
        self._indices = np.empty(0, dtype=np.int32)
        self._counts = [0] * len(self.datasets)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Sample:
        dataset, inner = self.locate(index)
        return self.datasets[dataset][inner]

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, index in it) of sample `index`, any int from 0 on."""
        if index < 0:
            raise IndexError(f"sample {index}")
        period, place = divmod(int(index), PERIOD)
        with self._lock:
            while place >= self._choices.size:
                self._extend()
        dataset = int(self._choices[place])
        return dataset, period * self.units[dataset] + int(self._indices[place])

    def _extend(self) -> None:
        """Appends one chunk of the greedy pattern."""
        units, counts, start = self.units, self._counts, self._choices.size
        choices, indices = [], []
        # Deficit, in units of 1/PERIOD samples, of each dataset once `start + 1` samples are dealt.
        deficits = [unit * start - PERIOD * count for unit, count in zip(units, counts)]
        for _ in range(min(CHUNK, PERIOD - start)):
            deficits = [deficit + unit for deficit, unit in zip(deficits, units)]
            chosen = deficits.index(max(deficits))
            deficits[chosen] -= PERIOD
            choices.append(chosen)
            indices.append(counts[chosen])
            counts[chosen] += 1
        self._choices = np.append(self._choices, np.array(choices, dtype=np.int32))
        self._indices = np.append(self._indices, np.array(indices, dtype=np.int32))


def _whole_units(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers of sum `total` in the proportion of `weights`, none below 1 (largest remainders)."""
    largest = max(weights)
    shares = [weight / largest for weight in weights]  # their sum cannot overflow
    exact = [share / math.fsum(shares) * total for share in shares]
    units = [max(1, math.floor(value)) for value in exact]
    order = sorted(range(len(weights)), key=lambda place: (units[place] - exact[place], place))
    missing = total - sum(units)
    for place in order[: max(0, missing)]:
        units[place] += 1
    if missing < 0:  # raising tiny weights to 1 took too much: the largest gives it back
        units[units.index(max(units))] += missing
    return units


def parse_data_paths(data_paths: Sequence[str], flag: str = "--data.train") -> list[tuple[float | None, str]]:
    """[(weight, prefix)] of `["a"]`, `["a", "b"]` (weights None: by their sizes) or `["0.7", "a", "0.3", "b"]`.

    Raises ConfigError for no path, a weight without a prefix, and a weight that is no positive number.
    """
    example = f"e.g. {flag} 0.7 data/a 0.3 data/b"
    if not data_paths:
        raise ConfigError(f"{flag}: no dataset given; a prefix or weights and prefixes, {example}")
    weights = [_number(word) for word in data_paths[0::2]]
    if weights[0] is None or _is_dataset(data_paths[0]):
        return [(None, path) for path in data_paths]
    if len(data_paths) % 2:
        raise ConfigError(f"{flag}: {data_paths[-1]} stands alone; weights and prefixes alternate, {example}")
    for word, weight in zip(data_paths[0::2], weights):
        if weight is None or not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"{flag}: {word} stands where a positive weight must; {example}")
    return list(zip(weights, data_paths[1::2]))


def open_dataset(
    prefix: str, tokenizer: Tokenizer | None, flag: str = "--data.train", chosen_by: str = "the tokenizer at hand"
) -> IndexedDataset:
    """Opens a dataset and holds its sidecar, where it has one, against the tokenizer.

    Whoever reads from it gets no id outside the tokenizer's vocabulary (without a tokenizer, the sidecar's), but a
    DataError. chosen_by: what the tokenizer was chosen by, for messages.
    Raises DataError as `IndexedDataset` does, TokenizerError for data made with another tokenizer.
    """
    indexed = IndexedDataset(prefix)
    known = tokenizer if tokenizer is not None else indexed.meta
    indexed.vocab_size = None if known is None else known.vocab_size
    if tokenizer is not None and indexed.meta is not None:
        if indexed.meta.tokenizer_hash != tokenizer.hash:
            raise TokenizerError(
                f"{flag} {prefix}: made with tokenizer {indexed.meta.tokenizer_name} "
                f"({indexed.meta.tokenizer_hash[:12]}), {chosen_by} is {tokenizer.name} ({tokenizer.hash[:12]}); "
                "use the same one, or preprocess again"
            )
        if indexed.meta.eod_id != tokenizer.eod_id:
            raise TokenizerError(
                f"{flag} {prefix}: documents end in token {indexed.meta.eod_id}, those of {chosen_by} in "
                f"{tokenizer.eod_id}; use the same one, or preprocess again"
            )
    return indexed


def build_dataset(
    data_paths: Sequence[str],
    seq_len: int,
    seed: int,
    tokenizer: Tokenizer | None,
    shuffle: bool = True,
    flag: str = "--data.train",
) -> PackedDataset | BlendedDataset[PackedDataset]:
    """The samples that `data_paths` (see `parse_data_paths`) name.

    Without a tokenizer the end-of-document id comes from the datasets' sidecars.

    Raises:
        ConfigError: paths and weights make no sense.
        DataError: a dataset is missing, damaged or too short, or nothing says which token ends a document.
        TokenizerError: data made with another tokenizer.
    """
    parsed = parse_data_paths(data_paths, flag)
    packed = []
    for _, prefix in parsed:
        indexed = open_dataset(prefix, tokenizer, flag, RUN_FLAGS.tokenizer)
        known = tokenizer if tokenizer is not None else indexed.meta
        if known is None:
            raise DataError(
                f"{flag} {prefix}: without {prefix}.meta.json nothing says which token ends a document; "
                "give --data.tokenizer, e.g. bytes"
            )
        packed.append(PackedDataset(indexed, seq_len, seed, known.eod_id, shuffle))
    if len(packed) == 1:
        return packed[0]
    sizes = [dataset.indexed.num_tokens for dataset in packed]
    return BlendedDataset(packed, [size if weight is None else weight for (weight, _), size in zip(parsed, sizes)])


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _is_dataset(prefix: str) -> bool:
    return dataset_file(prefix, ".idx").is_file()
