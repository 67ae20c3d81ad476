"""Tensors of somebody else's safetensors files, whole or by rows."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_adamba.checkpoint.canonical import read_checksums, read_tensor, wrong_checksum
from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import JsonObject, check_value, read_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
OWN_DTYPES = {**DTYPES, "F16": torch.float16}
"""of canonical checkpoints"""
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
_PIECE = 2**24
"""bytes that are read at once, or those of one row"""
_SHOWN = 300
"""characters of a name or a library's words in a message"""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what."""

    path: Path
    info: TensorInfo
    start: int = 0
    """first byte in the file, of those that can be read in parts"""


class TensorFolder:
    """All tensors of a folder of safetensors files; with an index, of the files that it names.

    Raises CheckpointError naming a file that is missing, damaged, a pickle, or holds what the index does not say.
    """

    def __init__(self, folder: Path, dtypes: dict[str, torch.dtype] | None = None) -> None:
        """dtypes: that are read, by the format's names; None: those of published checkpoints."""
        self.folder = folder
        places = _read_index(folder)
        self.entries: dict[str, Entry] = {}
        for path in _tensor_files(folder, places):
            for name, info, start in _read_infos(path, dtypes or DTYPES):
                if name in self.entries:
                    raise CheckpointError(f"{path}: tensor {name} is in {self.entries[name].path.name} too")
                self.entries[name] = Entry(path, info, start)
        for name, file in (places or {}).items():
            if name not in self.entries or self.entries[name].path.name != file:
                raise CheckpointError(f"{folder / file}: has no tensor {name}, though the index says so")
        if places is not None and (unlisted := sorted(set(self.entries) - set(places))):
            raise CheckpointError(f"{self.entries[unlisted[0]].path}: tensor {unlisted[0]} is not in the index")

    def read(self, name: str) -> Tensor:
        return read_tensor(self.entries[name].path, name)

    def check(self, name: str) -> None:
        """Hold a tensor of a canonical folder against its checksum, where it has one: whoever reads parts of tensors
        does not see all bytes. Raises CheckpointError."""
        wanted, entry = self._checksums.get(name), self.entries[name]
        if wanted is None:
            return
        left, found = entry.info.num_bytes, 0
        try:
            with open(entry.path, "rb") as stream:
                stream.seek(entry.start)
                while left and (block := stream.read(min(left, _PIECE))):
                    left, found = left - len(block), zlib.crc32(block, found)
        except OSError as error:
            raise _damaged(entry.path, error) from None
        if found != wanted:
            raise wrong_checksum(entry.path, name)

    @cached_property
    def _checksums(self) -> dict[str, int]:
        return read_checksums(self.folder)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the leading axis; no more is read."""
        path = self.entries[name].path
        try:
            with safe_open(path, framework="pt") as stream:
                return stream.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def leading(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """tensor[:shape[0], :shape[1], ...]. Rows that are left out are not read, not even ahead: of a part of a large
        checkpoint, reading is most of the work."""
        entry = self.entries[name]
        out = torch.empty(shape, dtype=entry.info.dtype)
        if out.dim() == 1:
            return out.copy_(self.read(name)[: shape[0]])
        *outer, all_rows, columns = entry.info.shape
        row = columns * out.element_size()
        most = max(1, _PIECE // row)
        buffer = torch.empty(min(most, shape[-2]) * row, dtype=torch.uint8)
        with open(entry.path, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for place in itertools.product(*map(range, shape[:-2])):
                matrix = sum(index * math.prod(outer[axis + 1 :]) for axis, index in enumerate(place))
                for first in range(0, shape[-2], most):
                    rows = min(most, shape[-2] - first)
                    part = buffer[: rows * row]
                    _read_exactly(stream, part, entry.start + (matrix * all_rows + first) * row)
                    wanted = part.view(out.dtype).view(rows, columns)[:, : shape[-1]]
                    out[place][first : first + rows] = wanted
        return out


def _read_exactly(stream: io.FileIO, buffer: Tensor, start: int) -> None:
    """Fill a tensor of bytes. Raises CheckpointError where the file ends before."""
    view = buffer.numpy().data
    while view:
        count = os.preadv(stream.fileno(), [view], start)
        if count == 0:
            raise CheckpointError(f"{stream.name}: ends in the middle of a tensor; restore the file")
        view, start = view[count:], start + count


def read_settings(path: Path) -> JsonObject:
    """A JSON object of a checkpoint. Raises CheckpointError."""
    return read_json(path, JsonObject, CheckpointError, "give the folder of a checkpoint, or restore the file")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file of the folder's index; None where there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a checkpoint")
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(f"{found[1]}: a second index beside {found[0].name}; keep the one that counts")
    places = read_settings(found[0]).get("weight_map")
    return check_value(places, dict[str, str], f"{found[0]}: weight_map", CheckpointError, "restore the file")


def _tensor_files(folder: Path, places: dict[str, str] | None) -> list[Path]:
    if places is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(places.values()))]
    for path in files:
        if path.suffix in _PICKLES:
            raise _pickle_error(path)
        if path.parent != folder or not os.path.isfile(path):
            if places is None:
                raise CheckpointError(f"{path}: is no regular file; restore it")
            shown = str(path) if len(str(path)) < _SHOWN else f"{str(path)[:_SHOWN]}..."
            raise CheckpointError(f"{shown}: missing, though the index names it")
    if files:
        return files
    pickles = [path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    raise (
        _pickle_error(pickles[0])
        if pickles
        else CheckpointError(f"{folder}: holds no .safetensors file; give the folder of a checkpoint")
    )


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: is a pickle, which can run code when it is read; convert it to safetensors first")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged ({' '.join(str(error).split())[:_SHOWN]})")


def _read_infos(path: Path, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, TensorInfo, int]]:
    """From the header, which the library compares with the size of the file; the last is a tensor's first byte."""
    try:
        with safe_open(path, framework="pt") as stream:
            starts = _starts(path)
            for name in sorted(stream.keys()):
                part = stream.get_slice(name)
                if part.get_dtype() not in dtypes:
                    raise CheckpointError(f"{path}: {name} is {part.get_dtype()}; one of {', '.join(dtypes)} is read")
                yield name, TensorInfo(tuple(part.get_shape()), dtypes[part.get_dtype()]), starts[name]
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _starts(path: Path) -> dict[str, int]:
    """Name -> first byte in a file whose header the library has read: 8 bytes of its length (little-endian), the header
    in JSON, the tensors (github.com/huggingface/safetensors, README)."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
