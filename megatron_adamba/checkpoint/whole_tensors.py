"""The tensors of a training checkpoint, whole, one at a time, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_adamba.checkpoint.dcp_json import METADATA_FILE, JsonReader, tensor_entries
from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.errors import CheckpointError

_BLOCK = 256


class WholeTensors:
    """Opened, every tensor is known to be covered once by its chunks, and every chunk to lie inside its file.

    Raises CheckpointError naming tensor or file where that is not so. Values are read by `chunks` and `read`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, JsonReader(folder)
        metadata = self.reader.read_metadata()
        self.entries = tensor_entries(metadata)
        self.infos = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype) for name, entry in self.entries.items()
        }
        self.files = sorted({place.relative_path for place in metadata.storage_data.values()})
        """those that hold chunks"""
        for name, entry in self.entries.items():
            try:
                check_cover(self.infos[name].shape, entry.chunks)
            except ValueError as error:
                raise CheckpointError(f"{folder / METADATA_FILE}: {name}: {error}; use an earlier checkpoint") from None
        self._check_places(metadata)

    def _check_places(self, metadata: Metadata) -> None:
        """Also that no two chunks share bytes, and that a chunk is long enough for its elements."""
        by_file: dict[str, list[tuple[int, int, str, int]]] = {file: [] for file in self.files}
        for name, entry in self.entries.items():
            for chunk in entry.chunks:
                place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                needed = prod(chunk.sizes) * self.infos[name].dtype.itemsize
                by_file[place.relative_path].append((place.offset, place.length, name, needed))
        for file, places in by_file.items():
            path, end = self.folder / file, 0
            try:
                size = path.stat().st_size
            except (OSError, ValueError) as error:
                what = getattr(error, "strerror", None) or error
                raise CheckpointError(f"{path}: {what}; use an earlier checkpoint") from None
            for start, length, name, needed in sorted(places):
                if start + length > size:
                    raise CheckpointError(
                        f"{path}: {name} lies at bytes {start} to {start + length} of {size}; use an earlier checkpoint"
                    )
                if start < end or length < needed:
                    why = "overlaps the chunk before it" if start < end else f"is too short for {needed} bytes"
                    raise CheckpointError(
                        f"{path}: {name} at bytes {start} to {start + length} {why}; use an earlier checkpoint"
                    )
                end = start + length

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offset in the tensor, values) of each chunk."""
        for chunk in self.entries[name].chunks:
            yield tuple(chunk.offsets), self.reader.read_chunk(name, chunk)

    def read(self, name: str) -> Tensor:
        """Of the canonical shape."""
        info = self.infos[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        for offset, values in self.chunks(name):
            whole[tuple(slice(low, low + size) for low, size in zip(offset, values.shape))] = values
        return whole


def check_cover(shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> None:
    """Raises ValueError where the chunks leave elements of a tensor out, overlap, or reach beyond it."""
    for chunk in chunks:
        low, size = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = len(low) == len(size) == len(shape)
        if not inside or any(a < 0 or n < 1 or a + n > end for a, n, end in zip(low, size, shape)):
            raise ValueError(f"the chunk of size {list(size)} at {list(low)} does not fit {list(shape)}")
    covered, total = sum(prod(chunk.sizes) for chunk in chunks), prod(shape)
    if covered < total:
        raise ValueError(f"its chunks hold {covered:,} of {total:,} elements")
    if (pair := _overlap(chunks)) is not None:
        first, second = (f"size {list(chunks[i].sizes)} at {list(chunks[i].offsets)}" for i in pair)
        raise ValueError(f"its chunks of {first} and of {second} overlap")


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> tuple[int, int] | None:
    """Two chunks that share elements. Every one is held against every other, a block of them at a time: there are
    thousands where many ranks share many units."""
    if len(chunks) < 2:
        return None
    if not chunks[0].offsets:
        return 0, 1
    low = torch.tensor([tuple(chunk.offsets) for chunk in chunks])
    high = low + torch.tensor([tuple(chunk.sizes) for chunk in chunks])
    for start in range(0, len(chunks), _BLOCK):
        rows = slice(start, start + _BLOCK)
        shared = ((low[rows, None] < high[None]) & (low[None] < high[rows, None])).all(-1)
        shared &= torch.arange(len(chunks)) > torch.arange(len(chunks))[rows, None]
        if shared.any():
            row, other = shared.nonzero()[0].tolist()
            return start + row, other
    return None
