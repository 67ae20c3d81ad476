"""A `.pt` file written tensor by tensor.

torch.save wants all tensors at once. What it writes is a zip archive: a pickle that names each tensor's type, size and
storage, and the storages one by one behind it, stored as they are. Names and sizes are known beforehand, so the pickle
goes first and the values follow as they come: memory is one tensor's.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.checkpoint.shards import TensorInfo

STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage}
_ROOT, _ALIGNMENT = "archive", 64
_LOCAL_HEADER, _ZIP64_EXTRA, _EXTRA_HEADER = 30, 20, 4
_ZIP64_LIMIT = 2**30
"""far below where zipfile needs the larger header, so that both agree on which entries have it"""


@dataclass(frozen=True)
class _Storage:
    key: str
    info: TensorInfo


@dataclass(frozen=True)
class _Tensor:
    """Pickled as a call of torch's own function, which is what torch.load expects."""

    storage: _Storage

    def __reduce__(self):
        shape = self.storage.info.shape
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object):
        if not isinstance(value, _Storage):
            return None
        return "storage", STORAGES[value.info.dtype], value.key, "cpu", value.info.numel


def write_torch_file(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A dict that torch.load reads, with `weights_only` and with `mmap` too; synced.

    infos: fp32 and bf16 alone; tensors: exactly those of `infos`, in its order. Raises ValueError where one is missing
    or not what was announced, OSError.
    """
    source = iter(tensors)
    with open(path, "wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, stream, "data.pkl", _pickled(infos))
            _add(archive, stream, "byteorder", b"little")
            for number, (wanted, info) in enumerate(infos.items()):
                name, tensor = next(source, ("nothing", torch.empty(0)))
                if name != wanted or TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                    raise ValueError(
                        f"{wanted} was announced as {info}; {name}, {tensor.dtype} {list(tensor.shape)}, came"
                    )
                _add(archive, stream, f"data/{number}", tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor
            if extra := next(source, None):
                raise ValueError(f"{extra[0]}: came and was not announced")
            _add(archive, stream, "version", b"3\n")
        stream.flush()
        os.fsync(stream.fileno())


def _pickled(infos: Mapping[str, TensorInfo]) -> bytes:
    out = io.BytesIO()
    held = {name: _Tensor(_Storage(str(number), info)) for number, (name, info) in enumerate(infos.items())}
    _Pickler(out, protocol=2).dump(held)
    return out.getvalue()


def _add(archive: zipfile.ZipFile, stream: io.BufferedWriter, name: str, content: bytes | memoryview) -> None:
    """One entry whose content starts at a multiple of 64 bytes, as a memory map of tensors should."""
    # a date of its own would make two equal files differ
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = len(content)
    large = len(content) > _ZIP64_LIMIT
    start = stream.seek(0, os.SEEK_END) + _LOCAL_HEADER + len(entry.filename) + _EXTRA_HEADER
    padding = -(start + (_ZIP64_EXTRA if large else 0)) % _ALIGNMENT
    # the two letters are those of torch's own padding
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as file:
        file.write(content)
