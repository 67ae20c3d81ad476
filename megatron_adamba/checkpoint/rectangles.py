"""Flat pieces of a row-major tensor as rectangles of it: ZeRO keeps pieces, checkpoints hold rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


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


class Fragment(torch.Tensor):
    """This rank's flat piece of a canonical tensor, in the form torch.distributed.checkpoint asks for.

    It has the canonical shape and no storage of its own; `pieces` are views into the flat piece, so loading writes
    straight into it.
    """

    pieces: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, flat: Tensor, start: int, shape: Sequence[int]) -> Fragment:
        """flat: [n] elements start .. start + n - 1 of the canonical tensor of `shape`; n may be 0."""
        fragment = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=flat.dtype, device=flat.device)
        fragment.pieces = {}
        for box in flat_rectangles(shape, start, start + flat.numel()):
            low = box.start - start
            fragment.pieces[box.offset] = flat[low : low + prod(box.size)].view(box.size)
        return fragment

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
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
        return self.pieces[tuple(index.offset)]
