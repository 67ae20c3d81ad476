"""Where the rows of a canonical tensor lie under tensor parallelism, and back.

Units of what nests (KV groups, blocks of FFN rows) are dealt round-robin: rank r of p owns units u with u % p == r, so
the first n units of a tensor are a local prefix of ceil((n - r) / p) units on every rank, and each rank has its share
of the work at every width. What never nests (the vocabulary, Mamba) is dealt in one run of units a rank, which keeps a
shard to few rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec

NESTED_UNITS = ("kv_group", "ffn_granule")
"""dealt round-robin; the others in one run a rank"""


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a shard that are consecutive in the canonical tensor too."""

    local: int
    canonical: int
    size: int


def owned_units(count: int, size: int, rank: int) -> int:
    """How many of the first `count` units rank `rank` of `size` owns when they are dealt round-robin; may be 0."""
    return max(0, -(-(count - rank) // size))


def contiguous_rows(length: int, unit: int, size: int, rank: int) -> tuple[int, int]:
    """First and one past the last of `length` rows of rank `rank` when each of `size` ranks takes one run of units."""
    count = -(-length // unit)
    return min(rank * count // size * unit, length), min((rank + 1) * count // size * unit, length)


def owned_runs(spec: ParamSpec, size: int, rank: int) -> tuple[Run, ...]:
    """The rows along `spec.unit_axis` that rank `rank` of `size` holds, in the order in which it holds them.

    A tensor that stays whole is one run of its first axis (none where it has no axes).
    """
    if spec.unit is None:
        return (Run(0, 0, spec.shape[0]),) if spec.shape else ()
    runs: list[Run] = []
    local = start = 0
    for length, unit in spec.parts:
        for low, high in _unit_bounds(spec.unit, length, unit, size, rank):
            if runs and runs[-1].canonical + runs[-1].size == start + low:
                runs[-1] = Run(runs[-1].local, runs[-1].canonical, runs[-1].size + high - low)
            else:
                runs.append(Run(local, start + low, high - low))
            local += high - low
        start += length
    return tuple(runs)


def _unit_bounds(kind: str, length: int, unit: int, size: int, rank: int) -> list[tuple[int, int]]:
    """First and one past the last row of each run of units, in one part of `length` rows."""
    if kind in NESTED_UNITS:
        count = -(-length // unit)
        return [(u * unit, min((u + 1) * unit, length)) for u in range(rank, count, size)]
    first, end = contiguous_rows(length, unit, size, rank)
    return [(first, end)] if end > first else []


def local_shape(spec: ParamSpec, size: int, rank: int) -> tuple[int, ...]:
    """Shape of the shard."""
    if spec.unit_axis is None or size == 1:
        return spec.shape
    rows = sum(run.size for run in owned_runs(spec, size, rank))
    return (*spec.shape[: spec.unit_axis], rows, *spec.shape[spec.unit_axis + 1 :])


def cut(spec: ParamSpec, whole: Tensor, size: int, rank: int) -> Tensor:
    """The shard of a canonical tensor: a copy where it is cut, the tensor itself where it stays whole."""
    assert tuple(whole.shape) == spec.shape, f"{spec.name}: {tuple(whole.shape)} is not its canonical {spec.shape}"
    if spec.unit_axis is None or size == 1:
        return whole
    pieces = [whole.narrow(spec.unit_axis, run.canonical, run.size) for run in owned_runs(spec, size, rank)]
    return torch.cat(pieces, dim=spec.unit_axis) if pieces else whole.new_empty(local_shape(spec, size, rank))


def join(spec: ParamSpec, shards: Sequence[Tensor]) -> Tensor:
    """The canonical tensor from the shards of all ranks, in the order of the ranks."""
    if spec.unit_axis is None or len(shards) == 1:
        return shards[0]
    whole = shards[0].new_empty(spec.shape)
    for rank, shard in enumerate(shards):
        for run in owned_runs(spec, len(shards), rank):
            source = shard.narrow(spec.unit_axis, run.local, run.size)
            whole.narrow(spec.unit_axis, run.canonical, run.size).copy_(source)
    return whole
