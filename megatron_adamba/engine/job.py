"""What a process knows of its job, and words that all of its ranks can read."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RankInfo:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str


class JobBoard:
    """Words that every rank of a job can write and read, in the job's store; where that is gone, nothing is there."""

    def __init__(self) -> None:
        default = importlib.import_module("torch.distributed.distributed_c10d")._get_default_store()
        # the store's own connection may be busy for as long as a rank waits for others
        self._store = default.clone()

    def write(self, topic: str, text: str) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            self._store.set(f"adamba/{topic}", text)

    def read(self, topic: str) -> str | None:
        key = f"adamba/{topic}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except (RuntimeError, ValueError):
            return None

    def written(self, topics: list[str]) -> set[str] | None:
        """Which of them are there; None where the store is gone."""
        try:
            return {topic for topic in topics if self._store.check([f"adamba/{topic}"])}
        except (RuntimeError, ValueError):
            return None
