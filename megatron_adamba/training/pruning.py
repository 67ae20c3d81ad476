"""When a run's older checkpoints go: not before a step after the newest one went well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from megatron_adamba.checkpoint.keeping import prune


class Pruning:
    """Deletes a run's checkpoints beyond the last `keep_last`, on one rank and beside training.

    The step that ruins the weights has a finite loss itself: its checkpoint must not replace a good one. The next
    step's loss, or an evaluation, shows whether it did.
    """

    def __init__(self, keep_last: int, run_id: Callable[[], str], say: Callable[[str], None]) -> None:
        """run_id: whose checkpoints may go; say: tells people what could not be deleted."""
        self.keep_last, self.run_id, self.say = keep_last, run_id, say
        self._newest: tuple[int, Path] | None = None
        self._thread: threading.Thread | None = None

    def saved(self, step: int, folder: Path) -> None:
        """`folder`, of step `step`, is on its way to be the newest checkpoint; nothing is known of its weights yet."""
        self._newest = step, folder

    def due(self, step: int) -> bool:
        """Whether step `step`, which went well, shows the newest checkpoint's weights to be sound."""
        return self._newest is not None and step > self._newest[0]

    def start(self) -> None:
        """Delete what has to go; the newest checkpoint is complete and sound."""
        self.finish()
        newest, self._newest = self._newest, None
        if newest is not None:
            self._thread = threading.Thread(target=self._delete, args=(newest[1],), name="pruning", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait for what is being deleted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _delete(self, newest: Path) -> None:
        try:
            prune(newest.parent, newest, self.keep_last, self.run_id())
        except OSError as error:
            self.say(f"WARNING: {error.filename}: an older checkpoint could not be deleted ({error.strerror})")
