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
            FailureNote(self.path).clear()
            for name in ("metrics.jsonl", "metrics-set-aside.jsonl"):
                if (self.path / name).is_dir():
                    raise ConfigError(f"--logging.run_dir {self.path}: {name} there is a folder; give another one")
        # on a machine of its own, where the folder may be another one
        (self.path / "logs").mkdir(parents=True, exist_ok=True)


class _QuietHandler(logging.FileHandler):
    """A log that cannot be written is no reason for tracebacks between a run's own lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
