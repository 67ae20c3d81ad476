"""What two checkpoints of any kind differ in, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.checkpoint.canonical import WEIGHT_PREFIX
from megatron_adamba.checkpoint.offline import OpenCheckpoint, described_model
from megatron_adamba.checkpoint.verify import place_of
from megatron_adamba.errors import CheckpointError

_BLOCK = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both, and how."""

    name: str
    how: str


def differences(
    first: OpenCheckpoint, second: OpenCheckpoint, weights_only: bool, tolerance: float | None = None
) -> Iterator[Difference]:
    """Tensors that differ, weights first, in the order of the first one's manifest.

    tolerance: values that lie no further apart count as equal, as do two NaN; None compares bit for bit. A tensor of
    another dtype differs in any case.
    """
    for name in _ordered_names(first, second):
        if weights_only and not name.startswith(WEIGHT_PREFIX):
            continue
        how = _how(first, second, name, tolerance)
        if how is not None:
            yield Difference(name, how)


def _ordered_names(first: OpenCheckpoint, second: OpenCheckpoint) -> list[str]:
    try:
        order = {spec.name: number for number, spec in enumerate(described_model(first)[1])}
    except CheckpointError:
        # a config that this version does not read: the tensors can be compared all the same
        order = {}

    def place(key: str) -> tuple[bool, str, int, str]:
        kind, _, name = key.partition("/")
        return kind + "/" != WEIGHT_PREFIX, kind, order.get(name, len(order)), name

    return sorted({**first.infos, **second.infos}, key=place)


def _how(first: OpenCheckpoint, second: OpenCheckpoint, name: str, tolerance: float | None) -> str | None:
    for checkpoint in (first, second):
        if name not in checkpoint.infos:
            return f"missing in {checkpoint.folder}"
    a, b = first.infos[name], second.infos[name]
    if a.shape != b.shape:
        return f"shape {list(a.shape)} against {list(b.shape)}"
    values = compare_values(first.read(name), second.read(name), tolerance)
    if a.dtype != b.dtype:
        dtypes = f"dtype {a.dtype} against {b.dtype}".replace("torch.", "")
        return f"{dtypes}; {values or 'the values are equal'}"
    return values


def compare_values(first: Tensor, second: Tensor, tolerance: float | None) -> str | None:
    """How the values of two tensors of one shape differ; None where they do not. float64 exists in blocks only."""
    a, b = first.reshape(-1), second.reshape(-1)
    count, largest, where = 0, -1.0, 0
    for start in range(0, a.numel(), _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        unlike = None
        if x.dtype == y.dtype:
            bits = _BITS[x.element_size()]
            unlike = x.view(bits) != y.view(bits)
            if not unlike.any():
                continue
        distance = _distance(x, y)
        if tolerance is not None:
            different = distance > tolerance
        else:
            different = distance > 0 if unlike is None else unlike
        if found := int(different.sum()):
            count += found
            distance[~different] = -1
            here = int(distance.argmax())
            if float(distance[here]) > largest:
                largest, where = float(distance[here]), start + here
    if not count:
        return None
    place = place_of(where, first.shape)
    numbers = f"{a[where].item()!r} against {b[where].item()!r}"
    bits_only = ", in bits only" if largest == 0 else ""
    return f"{count:,} of {a.numel():,} values differ{bits_only}, by {largest:g} at most, at {list(place)}: {numbers}"


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| in float64; equal infinities and two NaN lie 0 apart, a NaN and a number infinitely far."""
    x, y = x.double(), y.double()
    distance = (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    distance[(x == y) | (x.isnan() & y.isnan())] = 0
    return distance
