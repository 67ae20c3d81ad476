"""Whether a checkpoint is whole: every check says what is damaged, and nothing is held but one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.checkpoint.canonical import INDEX_FILE, read_checksums
from megatron_adamba.checkpoint.dcp_json import METADATA_FILE
from megatron_adamba.checkpoint.formats import Index
from megatron_adamba.checkpoint.offline import (
    TRAINING,
    OpenCheckpoint,
    check_weights,
    find_checkpoint,
    open_checkpoint,
)
from megatron_adamba.checkpoint.training import FILES_FILE, read_files, verify_files
from megatron_adamba.checkpoint.whole_tensors import WholeTensors
from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import read_json

_BLOCK = 1 << 18


def verify(path: Path) -> OpenCheckpoint:
    """Opens a checkpoint and checks all there is to check. Raises CheckpointError naming the first damage.

    Training: sizes and checksums of all files, chunks that cover every tensor once and lie inside files that have a
    checksum, the weights of the config's model, and that every chunk can be read and is what `metadata.json` says.
    Canonical: a complete index, headers that fit the files, the weights of the config's model, all of them finite, and
    their checksums, where the folder has them.
    """
    kind, folder = find_checkpoint(path)
    if kind == TRAINING:
        verify_files(folder)
    checkpoint = open_checkpoint(folder)
    if checkpoint.tensors is not None:
        _verify_training(checkpoint, checkpoint.tensors)
    else:
        _verify_canonical(checkpoint)
    return checkpoint


def _verify_training(checkpoint: OpenCheckpoint, tensors: WholeTensors) -> None:
    folder = checkpoint.folder
    listed = read_files(folder)
    if unlisted := [file for file in tensors.files if file not in listed]:
        raise CheckpointError(f"{folder / FILES_FILE}: has no checksum of {unlisted[0]}, which {METADATA_FILE} names")
    check_weights(checkpoint)
    for name in tensors.infos:
        for _ in tensors.chunks(name):
            pass


def _verify_canonical(checkpoint: OpenCheckpoint) -> None:
    folder = checkpoint.folder
    index = read_json(folder / INDEX_FILE, Index, CheckpointError, "restore the file")
    named = set(index["weight_map"].values())
    if stray := sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named):
        raise CheckpointError(f"{folder / stray[0]}: is not in {INDEX_FILE}")
    total, header = sum(info.num_bytes for info in checkpoint.infos.values()), index.get("metadata")
    if not isinstance(header, dict) or header.get("total_size") != total:
        said = header.get("total_size") if isinstance(header, dict) else None
        raise CheckpointError(f"{folder / INDEX_FILE}: says {said} bytes of tensors, the shards hold {total}")
    check_weights(checkpoint)
    sums = read_checksums(folder)
    if "crc32" in index and (bare := sorted({key.partition("/")[2] for key in checkpoint.infos} - set(sums))):
        raise CheckpointError(f"{folder / INDEX_FILE}: has no checksum of {bare[0]}; restore the file")
    # reading holds each tensor against its checksum
    for key in checkpoint.infos:
        name = key.partition("/")[2]
        if (found := _first_nonfinite(checkpoint.read(key))) is not None:
            count, place, value = found
            raise CheckpointError(f"{folder}: {name} has {count:,} values that are not finite, {value} at {place}")


def _first_nonfinite(tensor: Tensor) -> tuple[int, tuple[int, ...], float] | None:
    """How many values are not finite, where the first lies and what it is."""
    flat, count, first = tensor.reshape(-1), 0, None
    for start in range(0, flat.numel(), _BLOCK):
        bad = ~torch.isfinite(flat[start : start + _BLOCK])
        if bad.any():
            first = start + int(bad.nonzero()[0]) if first is None else first
            count += int(bad.sum())
    if first is None:
        return None
    return count, place_of(first, tensor.shape), flat[first].item()


def place_of(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index of element `number` of a row-major tensor."""
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(number), tuple(shape)))
