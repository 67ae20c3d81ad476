"""The folder of a run while it runs: locked, with a log for each rank."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from megatron_adamba.checkpoint.training import together
from megatron_adamba.engine.lost_ranks import FailureNote
from megatron_adamba.errors import AdambaError, ConfigError
from megatron_adamba.training.run_lock import RunLock

_FILES = ("metrics.jsonl", "metrics-set-aside.jsonl", "logs/failure.json")
_FOLDERS = ("logs", "checkpoints", "checkpoints/set-aside", "model", "set-aside", "tensorboard")


class RunFolder:
    """Entered by every rank alike; the first one holds the lock. Raises ConfigError where another run has the folder,
    StorageError where it cannot be written."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self._lock = RunLock(path)
        self._handler: logging.Handler | None = None

    def __enter__(self) -> RunFolder:
        together(self._prepare)
        self._handler = _QuietHandler(self.path / "logs" / f"rank-{self.rank}.log", delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("megatron_adamba")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def leave(self, error: AdambaError) -> None:
        """Ends this process at once, from whichever thread, with an error's line and exit code."""
        if self.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        logging.getLogger("megatron_adamba").error("error: %s", error)
        self._lock.release()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)

    def _prepare(self) -> None:
        if self.rank == 0:
            self._lock.acquire()
            _check_kinds(self.path)
            FailureNote(self.path).clear()
        # on a machine of its own, where the folder may be another one
        _check_kinds(self.path)
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        _check_file(self.path, f"logs/rank-{self.rank}.log")


def _check_kinds(path: Path) -> None:
    """What a run reads and writes in its folder is what it has to be: a pipe would be waited for, a link that leads
    nowhere be found out at the end of all training. Raises ConfigError."""
    for name in _FILES:
        _check_file(path, name)
    for name in _FOLDERS:
        there = path / name
        if os.path.lexists(there) and not there.is_dir():
            raise ConfigError(_told(path, name, "folder"))


def _check_file(path: Path, name: str) -> None:
    """Raises ConfigError."""
    there = path / name
    if os.path.lexists(there) and not there.is_file():
        raise ConfigError(_told(path, name, "regular file"))


def _told(path: Path, name: str, kind: str) -> str:
    return f"--logging.run_dir {path}: {name} there is no {kind}; move it away, or give another folder, {path}-2"


class _QuietHandler(logging.FileHandler):
    """A log that cannot be written is no reason for tracebacks between a run's own lines, nor to end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            # it is opened with its first line
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass
