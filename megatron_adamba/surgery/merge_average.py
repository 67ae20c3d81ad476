"""The mean of several checkpoints of one model, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.sources import OWN_DTYPES, TensorFolder
from megatron_adamba.surgery.writing import Job, PlannedTensor

_PIECE = 2**22
"""values that are summed up at once, or those of one row"""


def merge_average(sources: Sequence[Path], weights: Sequence[float] | None = None) -> Job:
    """Plan the weighted mean of all sources, summed up in float64 and written in the first one's dtypes.

    weights: one a source, in any unit: they are divided by their sum; None: all alike. Tokenizer, settings outside the
    model and history are the first source's. Raises CheckpointError, ConfigError, TokenizerError.
    """
    if len(sources) < 2:
        raise ConfigError(f"merge-average: {len(sources)} source(s); give two or more, for example A B DST")
    weights = _checked_weights(sources, weights)
    opened = [open_canonical(source) for source in sources]
    first = opened[0]
    for source, other in zip(sources[1:], opened[1:]):
        _check_same(first, other, sources[0], source)
    origin = f"mean of {len(sources)}"
    folders = [TensorFolder(source, OWN_DTYPES) for source in sources]
    tensors = tuple(
        PlannedTensor(name, info.shape, info.dtype, origin, partial(_mean, name, info, folders, weights))
        for name, info in first.opened.weights.items()
    )
    values = {**first.opened.config, "model": asdict(first.config)}
    arguments = {"sources": [str(source) for source in sources], "weights": weights}
    history = extended_history(sources[0], "merge-average", arguments, "canonical")
    promise = f"the weights are the mean of {len(sources)} checkpoints; the logits are no one's"
    return Job(tensors, values, history, promise, first.tokenizer_files())


def _checked_weights(sources: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        weights = [1.0] * len(sources)
    text, example = ",".join(f"{weight:g}" for weight in weights), ",".join(["1"] * len(sources))
    if len(weights) != len(sources):
        raise ConfigError(
            f"--weights {text}: {len(weights)} for {len(sources)} sources; for example --weights {example}"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ConfigError(
            f"--weights {text}: must be 0 or more each, and above 0 together; for example --weights {example}"
        )
    return [float(weight) for weight in weights]


def _check_same(first: CanonicalSource, other: CanonicalSource, first_folder: Path, folder: Path) -> None:
    """Equal configs have tensors of equal names and shapes: both were checked against their own."""
    theirs = asdict(other.config)
    for name, value in asdict(first.config).items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{folder}: model.{name} is {theirs[name]}, {first_folder} has {value}; "
                f"merge checkpoints of the same model"
            )
    mine, its = (source.opened.config.get("tokenizer_hash") for source in (first, other))
    if mine is not None and its is not None and mine != its:
        raise TokenizerError(
            f"{folder}: was trained with another tokenizer than {first_folder} ({its[:12]}, {mine[:12]}); "
            f"merge checkpoints of the same tokenizer"
        )


def _mean(name: str, info: TensorInfo, sources: Sequence[TensorFolder], weights: Sequence[float]) -> Tensor:
    """Some rows at a time, of one source after the other."""
    for source in sources:
        source.check(name)
    mean = torch.empty(info.shape, dtype=info.dtype)
    rows = max(1, _PIECE // math.prod(info.shape[1:]))
    for start in range(0, info.shape[0], rows):
        part = mean[start : start + rows]
        total = torch.zeros(part.shape, dtype=torch.float64)
        for source, weight in zip(sources, weights):
            total.add_(source.rows(name, start, start + len(part)).double(), alpha=weight)
        part.copy_(total.div_(sum(weights)))
    return mean
