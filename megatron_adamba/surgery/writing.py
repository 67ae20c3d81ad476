"""What an operation is going to write, and writing it tensor by tensor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.checkpoint.aside import clear_leftovers
from megatron_adamba.checkpoint.canonical import write_canonical
from megatron_adamba.checkpoint.shards import TensorInfo, plan_shards
from megatron_adamba.errors import ConfigError, StorageError


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    """where it comes from, for people"""
    make: Callable[[], Tensor]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype)


@dataclass(frozen=True)
class Job:
    """An operation that has been checked and waits to be written."""

    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    """the new config.json"""
    history: list[dict[str, Any]]
    promise: str
    """what the operation preserves, in a line"""
    files: list[Path] = field(default_factory=list)
    """copied in under their own names"""
    contents: dict[str, bytes] = field(default_factory=dict)
    """written beside them, by name"""
    note: str = ""
    """what the user should know besides, in a line"""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor.info for tensor in self.tensors}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def num_shards(self, max_shard_bytes: int) -> int:
        return len(plan_shards(self.infos, max_shard_bytes))


Report = Callable[[str, int, float], None]
"""called behind each tensor with its name, its bytes and the seconds that reading, making and writing it took"""


def check_target(folder: Path) -> None:
    """Nothing is ever written over. Raises ConfigError."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: exists already; give a folder that does not, for example {folder}-2")


def write_job(job: Job, folder: Path, max_shard_bytes: int, report: Report) -> None:
    """Write aside and rename: after a failure `folder` is not there. Memory: a tensor or two.

    Raises ConfigError where the folder exists, StorageError where the disk is too small or refuses.
    """
    prepare_target(folder, job.num_bytes)
    with at_the_pace_of_the_disk():
        write_canonical(
            folder, job.config, _made(job, report), job.files, max_shard_bytes, job.infos, job.history, job.contents
        )


@contextmanager
def at_the_pace_of_the_disk() -> Iterator[None]:
    """One thread, as more would only wait for each other between two writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _made(job: Job, report: Report) -> Iterator[tuple[str, Tensor]]:
    for tensor in job.tensors:
        start = time.perf_counter()
        # the writer comes back for the next one when this one is written
        yield tensor.name, tensor.make()
        report(tensor.name, tensor.info.num_bytes, time.perf_counter() - start)


def prepare_target(folder: Path, num_bytes: int) -> None:
    """Room for so many bytes, without what a killed run left. Raises ConfigError where the folder exists, StorageError
    where the disk is too small."""
    check_target(folder)
    clear_leftovers(folder)
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise StorageError(f"{folder}: {num_bytes / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")
