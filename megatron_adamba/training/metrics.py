"""metrics.jsonl, and what else hears of its lines; rank 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.files import as_storage_error, write_atomically
from megatron_adamba.training.dashboards import Dashboard, tagged

SET_ASIDE = "metrics-set-aside.jsonl"
"""beside metrics.jsonl: lines of steps that were taken again, of runs before, and lines that cannot be read"""


class MetricsWriter:
    """One JSON object a line, flushed at once; a resumed run sets lines from steps that it takes again aside."""

    def __init__(
        self,
        config: AdambaConfig,
        run_dir: Path,
        first_step: int,
        dashboards: Callable[[], list[Dashboard]] = list,
        listener: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """dashboards: makes those that are asked for, once the lines are in order; listener: is called with each
        record. Raises StorageError, as `write` and `close` do, where the disk is full or refuses to be written to."""
        self._optimizer, self._listener = config.optimizer, listener
        self.path = run_dir / "metrics.jsonl"
        with _disk(self.path):
            _cut_back(self.path, first_step, first_step >= config.train.steps)
            self._file = open(self.path, "ab")  # noqa: SIM115 - lives as long as the run
            self._dashboards = dashboards()

    def write(self, record: dict[str, Any]) -> None:
        """record: has `step`; values that are not finite become null, as JSON has no word for them."""
        clean = {key: _finite(value) for key, value in record.items()}
        with _disk(self.path):
            self._file.write(json.dumps(clean).encode() + b"\n")
            self._file.flush()
            for dashboard in self._dashboards:
                dashboard.write(record["step"], tagged(clean, self._optimizer))
        if self._listener is not None:
            self._listener(clean)

    def close(self) -> None:
        with _disk(self.path):
            self._file.close()
            for dashboard in self._dashboards:
                dashboard.close()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise as_storage_error(error, str(error.filename or path)) or error from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records that can be read; a line cut short by a kill, or damaged, is left out."""
    return [record for record, _ in _lines(path) if record is not None]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each line's record, None where it is none, and its bytes without the end."""
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        sound = isinstance(record, dict) and type(record.get("step")) is int
        yield record if sound else None, line


def _cut_back(path: Path, first_step: int, final: bool) -> None:
    """Leaves the lines up to `first_step`, none for 0; all others go to the end of `metrics-set-aside.jsonl`."""
    if not path.exists():
        return
    kept: list[bytes] = []
    aside: list[bytes] = []
    for record, line in _lines(path):
        keep = False
        if record is not None and 0 < record["step"] <= first_step:
            # a finished run that is started again evaluates its last step once more
            again = final and record["step"] == first_step
            keep = not again or record.keys().isdisjoint(("eval_width", "eval_exit"))
        (kept if keep else aside).append(line + b"\n")
    if not aside and path.read_bytes()[-1:] not in (b"", b"\n"):
        # a line that was cut right before its end
        write_atomically(path, b"".join(kept))
    if aside:
        with open(path.with_name(SET_ASIDE), "ab") as stream:
            stream.writelines(aside)
            stream.flush()
            os.fsync(stream.fileno())
        write_atomically(path, b"".join(kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
