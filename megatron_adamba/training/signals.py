"""Signals as a request to stop and save, on every rank, within the half minute that launchers leave a job."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_adamba.engine.job import JobBoard
from megatron_adamba.errors import StoppedBySignal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""of launchers, keyboards, closing terminals, and what SLURM sends before a time limit (sbatch --signal)"""
SECONDS_LEFT = 30
"""between the signal that deepspeed, torchrun and srun pass on and their SIGKILL"""
_GRACE, _PAUSE = 2.0, 0.5
"""seconds that the loop has to come to the end of its step by itself; seconds between looks"""
_TOPIC = "stop"


class StopRequest:
    """While entered, signals set `requested`, here and within seconds on all other ranks.

    The loop ends at the end of its step and saves. Where a step takes longer than the grace, a thread of each rank
    saves the state as it stood before that step, which no rank then completes, and ends its process: `interruptible` is
    where that may happen, `may_update` what every rank asks before its weights change.
    """

    def __init__(
        self,
        save: Callable[[], Path],
        board: JobBoard,
        say: Callable[[str], None],
        leave: Callable[[StoppedBySignal], None],
    ) -> None:
        """save: every rank calls it with the same counters, from whichever thread; say: to people, on one rank; leave:
        ends the process."""
        # two words, each with one writer: a handler may run in the middle of anything, a look at the board too
        self._own: str | None = None
        self._told: str | None = None
        self._save, self._board, self._say, self._leave = save, board, say, leave
        self._lock = threading.Lock()
        self._interruptible = self._begun = False
        self._saved: Path | None = None
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._launcher: int | None = os.getppid()
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            # nohup and others that ignore a signal mean it
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        if kind is not None and issubclass(kind, RuntimeError):
            # a rank that fails is told to end by its launcher within a second, and has something to say first
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that leaves weights, optimizer state and counters as they are, unless `may_update` is called in it."""
        with self._lock:
            self._interruptible = True
        try:
            yield
        finally:
            with self._lock:
                self._interruptible = False

    def may_update(self) -> bool:
        """Whether this rank's state may change now; asked once a step, and only if all ranks say yes it does."""
        with self._lock:
            self._interruptible = False
            return not self._begun

    def finish(self) -> Path:
        """Save, or wait for the thread that does; the checkpoint's folder. Every rank calls it. Raises what saving
        raised."""
        with self._lock:
            begun, self._begun = self._begun, True
        if not begun:
            self._saved = self._save()
        while True:
            if self._failure is not None:
                raise self._failure
            if self._saved is not None:
                return self._saved
            time.sleep(_PAUSE / 10)

    @property
    def requested(self) -> str | None:
        """The signal that asked, as far as this rank knows of one."""
        return self._own or self._told

    def asked(self) -> bool:
        """Whether this rank was asked to stop; if so, all ranks can read by what from now on."""
        name = self.requested
        if name is not None:
            self._board.write(_TOPIC, name)
        return name is not None

    @property
    def heard(self) -> bool:
        """Whether any rank was asked to stop, as far as this one can know."""
        if self.requested is None:
            self._look_at_the_board()
        return self.requested is not None

    def _look_at_the_board(self) -> None:
        if (found := self._board.read(_TOPIC)) is not None:
            self._told = found

    def stopped(self, folder: Path) -> StoppedBySignal:
        """What ends the run."""
        name = self.requested if self.heard else "a signal"
        return StoppedBySignal(f"{name}: saved {folder}; go on with --resume auto")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = signal.Signals(number).name

    def _watch(self) -> None:
        while not self._closing.wait(_PAUSE):
            self._look_for_the_launcher()
            if self.requested is None:
                self._look_at_the_board()
            if not self.asked():
                continue
            self._say(
                f"{self.requested}: saves and stops at the end of this step, or as it stood before it where that is "
                f"more than {_GRACE:.0f} s away (launchers kill a job {SECONDS_LEFT} s after they pass a signal on)"
            )
            break
        if self._closing.wait(_GRACE):
            return
        while not self._closing.wait(_PAUSE / 10):
            with self._lock:
                if self._begun:
                    return
                if self._interruptible:
                    self._begun = True
                    break
        if self._begun:
            self._save_and_leave()

    def _look_for_the_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._say(
                f"WARNING: the launcher, process {self._launcher}, is gone, and the run goes on without it; kill -TERM "
                f"{os.getpid()} saves and ends it"
            )
            self._launcher = None

    def _save_and_leave(self) -> None:
        try:
            saved = self._save()
        except BaseException as error:
            # the loop raises it when it comes to the end of its step
            self._failure = error
            return
        # the main thread may be in the middle of anything
        self._leave(self.stopped(saved))
