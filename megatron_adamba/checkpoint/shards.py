"""safetensors shards written tensor by tensor.

The library writes a file from tensors that are all in memory at once. Where shapes are known beforehand the header can
be written first and the values put behind it as they come: the bytes are the library's, the memory is one tensor's.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPE_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""what checkpoints hold, by the names of safetensors, and in the order in which it lays them out"""
_LENGTH_BYTES, _ALIGNMENT = 8, 8


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and where in the file each tensor starts."""
    codes = list(DTYPE_CODES)
    order = sorted(infos, key=lambda name: (codes.index(infos[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in order:
        info = infos[name]
        starts[name], end = position, position + info.num_bytes
        entries[name] = {
            "dtype": DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    base = _LENGTH_BYTES + len(text)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, {name: base + start for name, start in starts.items()}


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Names shard by shard, in order; a tensor above the limit has a shard of its own. At least one shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """number: from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def stream_shards(
    folder: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> tuple[dict[str, str], dict[str, int]]:
    """Write the shards of `infos`; returns name -> file and name -> `checksum`.

    tensors: exactly those of `infos`, in its order. Raises ValueError where one is missing or not what was announced.
    """
    shards = plan_shards(infos, max_shard_bytes)
    source = iter(tensors)
    places: dict[str, str] = {}
    sums: dict[str, int] = {}
    for number, names in enumerate(shards):
        path = folder / shard_name(number, len(shards))
        sums |= _write_shard(path, {name: infos[name] for name in names}, source)
        places.update(dict.fromkeys(names, path.name))
    if extra := next(source, None):
        raise ValueError(f"{extra[0]}: came and was not announced")
    return places, sums


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes as they lie in a file."""
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_shard(path: Path, infos: Mapping[str, TensorInfo], source: Iterator[tuple[str, Tensor]]) -> dict[str, int]:
    """The header at once, then each tensor at its place; synced, and read back by the library, which checks that header
    and file fit. Returns checksums."""
    header, starts = _header(infos)
    sums = {}
    with open(path, "wb") as stream:
        stream.write(header)
        for wanted, info in infos.items():
            name, tensor = next(source, ("nothing", torch.empty(0)))
            if name != wanted or TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                raise ValueError(f"{wanted} was announced as {info}; {name}, {tensor.dtype} {list(tensor.shape)}, came")
            stream.seek(starts[name])
            content = _bytes(tensor)
            sums[wanted] = zlib.crc32(content)
            stream.write(content)
            del tensor, content
        stream.flush()
        os.fsync(stream.fileno())
    with safe_open(path, framework="pt") as written:
        assert set(written.keys()) == set(infos), path
    return sums
