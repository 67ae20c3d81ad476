"""Saving while training goes on: the fragments are copied to host memory, a thread of each rank writes the copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_adamba.checkpoint.rectangles import Fragment
from megatron_adamba.checkpoint.training import save_training_checkpoint

Write = Callable[..., Path]
"""`save_training_checkpoint`, or what stands in its place"""


class BackgroundSaver:
    """At most one checkpoint is on its way at a time; every rank calls every method alike.

    group: a gloo group of all ranks that nobody else uses, as the threads meet in it while the main threads meet
    elsewhere (`saving_group`).
    """

    def __init__(self, group: dist.ProcessGroup | None, write: Write = save_training_checkpoint) -> None:
        self.group, self.write = group, write
        self._thread: threading.Thread | None = None
        self._result: Path | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint on its way has failed on this rank; `finish` then raises on all."""
        return self._failure is not None

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is on its way on this rank."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, root: Path, step: int, fragments: dict[str, Fragment], state: dict[str, Any]) -> None:
        """Copy the fragments and return; waits first for the checkpoint before, and raises what that one raised."""
        self.finish()
        copies = {name: fragment.copy_to_host() for name, fragment in fragments.items()}

        def run() -> None:
            try:
                self._result = self.write(root, step, copies, state, self.group)
            except BaseException as error:
                self._failure = error

        # a daemon: when training fails meanwhile, the process ends without waiting for ranks that may be gone
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> Path | None:
        """Wait for the checkpoint on its way; its folder, or None where there was none. Raises what it raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure
        return self._result


def saving_group() -> dist.ProcessGroup:
    """A group for `BackgroundSaver`; every rank calls this alike."""
    return dist.new_group(backend="gloo")
