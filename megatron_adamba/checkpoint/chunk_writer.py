"""Training checkpoints written by one process in the place of all ranks of a layout."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.checkpoint.aside import written_aside
from megatron_adamba.checkpoint.canonical import WEIGHT_PREFIX
from megatron_adamba.checkpoint.dcp_json import METADATA_FILE, metadata_to_dict
from megatron_adamba.checkpoint.rectangles import Fragment, placement
from megatron_adamba.checkpoint.training import FILES_FILE, STATE_FILE
from megatron_adamba.files import write_atomically
from megatron_adamba.parallel.layout import cut


class _SummedFile:
    """What a file will be in `files.json` is known when its last byte is written: nothing is read again."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.checksum = path, 0, 0
        self.failure: OSError | None = None
        path.touch(exist_ok=False)

    def add(self, tensor: Tensor) -> tuple[int, int]:
        """Append a tensor as torch.distributed.checkpoint does; returns where it starts and how long it is."""
        start = self.size
        try:
            # opened for each chunk: a large layout has more files than a process may hold open
            with open(self.path, "ab") as self.stream:
                # torch calls write and flush, and wants no more of a file
                torch.save(tensor.clone(), self)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch tells of a write that failed, not why
            raise self.failure or error from None
        return start, self.size - start

    def write(self, block: memoryview) -> int:
        try:
            written = self.stream.write(block)
        except OSError as error:
            self.failure = error
            raise
        self.checksum, self.size = zlib.crc32(block, self.checksum), self.size + written
        return written

    def flush(self) -> None:
        self.stream.flush()

    def sync(self) -> None:
        with open(self.path, "rb+") as stream:
            os.fsync(stream.fileno())

    @property
    def fingerprint(self) -> dict[str, int]:
        return {"bytes": self.size, "crc32": self.checksum}


def rank_pieces(
    spec: ParamSpec, whole: Tensor, tp: int, dp: int
) -> Iterator[tuple[int, dict[tuple[int, ...], Tensor]]]:
    """(rank, offset -> rectangle) for every rank that holds something of a canonical tensor.

    Ranks as a run numbers them, tp fastest: rank = dp_rank * tp + tp_rank. Each tp shard, flat, is cut into dp runs of
    equal length (the last ones may be short or empty), as ZeRO 3 cuts a parameter; ZeRO 1 and 2 cut all parameters of
    a group end to end, and their runs end elsewhere. What tensor parallelism leaves whole its first rank holds.
    """
    for tp_rank in range(1 if spec.unit is None else tp):
        shard = cut(spec, whole, tp, tp_rank).reshape(-1)
        place = placement(spec, tp, tp_rank)
        length = -(-shard.numel() // dp)
        for dp_rank in range(dp):
            run = shard[dp_rank * length : (dp_rank + 1) * length]
            if run.numel():
                yield dp_rank * tp + tp_rank, Fragment(run, dp_rank * length, place).pieces


def write_training(
    folder: Path,
    state: Mapping[str, Any],
    tensors: Iterable[tuple[ParamSpec, Tensor]],
    tp: int,
    dp: int,
    carried: Mapping[str, bytes] | None = None,
) -> None:
    """Write aside and rename: `weight/NAME` of every canonical tensor, cut for tp x dp ranks, a file for each.

    state: JSON values; carried: the tokenizer's files, by name. One tensor and one shard of it are in memory at a time.
    Raises StorageError where the disk is full.
    """
    with written_aside(folder) as aside:
        files = [_SummedFile(aside / f"__{rank}_0.distcp") for rank in range(tp * dp)]
        entries: dict[str, STORAGE_TYPES] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for spec, tensor in tensors:
            key, chunks = WEIGHT_PREFIX + spec.name, []
            for rank, pieces in rank_pieces(spec, tensor, tp, dp):
                for offset, piece in pieces.items():
                    chunk = ChunkStorageMetadata(torch.Size(offset), piece.shape)
                    start, length = files[rank].add(piece)
                    chunks.append(chunk)
                    places[MetadataIndex(key, chunk.offsets)] = _StorageInfo(files[rank].path.name, start, length)
            entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
        for file in files:
            file.sync()
        marks = {file.path.name: file.fingerprint for file in files}
        contents = dict(carried or {})
        contents[METADATA_FILE] = json.dumps(metadata_to_dict(Metadata(entries), places)).encode()
        contents[STATE_FILE] = json.dumps(state, indent=1).encode()
        for name, content in contents.items():
            write_atomically(aside / name, content)
            marks[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        write_atomically(aside / FILES_FILE, json.dumps(marks, indent=1).encode())
