"""Flat pieces of a row-major tensor as rectangles of it: ZeRO keeps pieces, checkpoints hold rectangles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.parallel.layout import Run, local_shape, owned_runs


@dataclass(frozen=True)
class Rectangle:
    """A box of a tensor and where its elements begin in the flat tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int


def flat_rectangles(shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """Boxes that cover elements start .. stop - 1 of a row-major tensor, in order and without overlap.

    Whole rows go into one box, so there are at most 2 * ndim - 1 of them.
    """
    if stop <= start:
        return []
    shape = tuple(shape)
    if not shape:
        return [Rectangle((), (), start)]
    inner = prod(shape[1:])
    first, last = start // inner, -(-stop // inner)
    if len(shape) == 1 or (start == first * inner and stop == last * inner):
        count = (stop - start) // inner
        return [Rectangle((first,) + (0,) * (len(shape) - 1), (count, *shape[1:]), start)]
    boxes: list[Rectangle] = []
    row = first
    if start > first * inner or stop < (first + 1) * inner:
        boxes += _inside_row(shape, first, start, min(stop, (first + 1) * inner))
        row = first + 1
    whole = stop // inner
    if whole > row:
        boxes += flat_rectangles(shape, row * inner, whole * inner)
    if stop > max(whole, row) * inner:
        boxes += _inside_row(shape, whole, whole * inner, stop)
    return boxes


def _inside_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Rectangle]:
    base = row * prod(shape[1:])
    return [
        Rectangle((row, *box.offset), (1, *box.size), base + box.start)
        for box in flat_rectangles(shape[1:], start - base, stop - base)
    ]


@dataclass(frozen=True)
class Placement:
    """Where a shard lies in its canonical tensor."""

    shape: tuple[int, ...]
    """of the canonical tensor"""
    local_shape: tuple[int, ...]
    axis: int = 0
    runs: tuple[Run, ...] = ()
    """rows along `axis` that the shard holds; none where the shard is the whole tensor"""

    def canonical_parts(self, offset: tuple[int, ...], box: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """A box of the shard as boxes of the canonical tensor: their offsets, and views into `box`."""
        if not self.runs:
            yield offset, box
            return
        low, high = offset[self.axis], offset[self.axis] + box.shape[self.axis]
        for run in self.runs:
            first, last = max(low, run.local), min(high, run.local + run.size)
            if first < last:
                row = run.canonical + first - run.local
                part = box.narrow(self.axis, first - low, last - first)
                yield (*offset[: self.axis], row, *offset[self.axis + 1 :]), part


def placement(spec: ParamSpec, size: int, rank: int) -> Placement:
    """Of the shard that rank `rank` of `size` tensor-parallel ranks holds."""
    if spec.unit_axis is None or size == 1:
        return Placement(spec.shape, spec.shape)
    return Placement(spec.shape, local_shape(spec, size, rank), spec.unit_axis, owned_runs(spec, size, rank))


class Fragment(torch.Tensor):
    """This rank's flat piece of a shard of a canonical tensor, in the form torch.distributed.checkpoint asks for.

    It has the canonical shape and no storage of its own; `pieces` are views into the flat piece, so loading writes
    straight into it.
    """

    pieces: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, flat: Tensor, start: int, place: Placement) -> Fragment:
        """flat: [n] elements start .. start + n - 1 of this rank's shard; n may be 0."""
        fragment = torch.Tensor._make_wrapper_subclass(cls, place.shape, dtype=flat.dtype, device=flat.device)
        fragment.pieces = {}
        for box in flat_rectangles(place.local_shape, start, start + flat.numel()):
            low = box.start - start
            piece = flat[low : low + prod(box.size)].view(box.size)
            for offset, part in place.canonical_parts(box.offset, piece):
                fragment.pieces[offset] = part
        return fragment

    def copy_to_host(self) -> Fragment:
        """The same fragment with copies of its pieces in host memory."""
        copy = torch.Tensor._make_wrapper_subclass(
            Fragment, tuple(self.shape), dtype=self.dtype, device=torch.device("cpu")
        )
        copy.pieces = {offset: piece.detach().to("cpu", copy=True) for offset, piece in self.pieces.items()}
        return copy

    # torch's types have a plain function where it asks for a class method
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise TypeError(f"a checkpoint fragment takes no part in {func}")

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=piece.shape) for offset, piece in self.pieces.items()
        ]

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.pieces[tuple(index.offset or ())]
