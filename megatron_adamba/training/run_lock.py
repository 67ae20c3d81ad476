"""One run to a folder: a lock file with its owner's name, that outlives neither its owner nor a file system of others.

The file appears by a hard link, which network file systems make atomically. An owner on this machine is looked up by
process and start time; one elsewhere shows that it lives by counting up in the file.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_adamba.errors import ConfigError
from megatron_adamba.schema import Count, read_json

NAME = "lock.json"
_BEAT = 10.0
"""seconds between an owner's signs of life"""
_DEAD = 6 * _BEAT
"""seconds without one after which an owner elsewhere is taken for dead"""
_ADVICE = "delete it if no run uses the folder"


@dataclass
class _Owner:
    host: str
    space: str
    """the machine's boot and this container's numbering of processes"""
    pid: Count
    started: str
    """of the process, in the kernel's ticks: numbers of processes come again"""
    key: str
    since: str
    beats: Count = 0

    @classmethod
    def this_process(cls) -> _Owner:
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), _space(), pid, _start_of(pid) or "", secrets.token_hex(8), since)

    @property
    def gone(self) -> bool | None:
        """Whether the process is no more; None where that cannot be told from here."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return None
        return _start_of(self.pid) != self.started


class RunLock:
    """Held from `acquire` to `release`."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print, patience: float = _DEAD) -> None:
        """patience: seconds that an owner on another machine has to show that it lives; say: told of that wait."""
        self.path, self.say, self.patience = folder / NAME, say, patience
        self._own: _Owner | None = None
        self._released, self._writing = threading.Event(), threading.Lock()

    def acquire(self) -> RunLock:
        """Raises ConfigError naming the owner where another run holds the folder, OSError where nobody can write it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = _Owner.this_process()
        aside = self.path.with_name(f"{NAME}.{own.key}")
        aside.write_text(json.dumps(asdict(own)))
        try:
            while not _linked(aside, self.path):
                self._wait_for_the_dead()
        finally:
            aside.unlink(missing_ok=True)
        self._own = own
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Quiet where the lock was never held, or is somebody else's by now."""
        self._released.set()
        with self._writing:
            if self._own is not None and (held := self._read()) is not None and held.key == self._own.key:
                self.path.unlink(missing_ok=True)
            self._own = None

    def _wait_for_the_dead(self) -> None:
        """Returns when the file is gone; takes it away where its owner is."""
        owner, end = self._read(), time.monotonic() + self.patience
        if owner is not None and owner.gone is None:
            self.say(f"{self.path}: held from {owner.host}; waits {self.patience:.0f} s for a sign of life from there")
        while owner is not None and owner.gone is None and time.monotonic() < end:
            time.sleep(min(1.0, self.patience / 5))
            before, owner = owner, self._read()
            if owner is not None and (owner.key, owner.beats) != (before.key, before.beats):
                self._refuse(owner)
        if owner is None and self.path.is_symlink():
            raise ConfigError(f"{self.path}: is a link to nothing; {_ADVICE}")
        if owner is None:
            return
        if owner.gone is False:
            self._refuse(owner)
        # renamed first: of two that wait, one takes it away
        stale = self.path.with_name(f"{NAME}.{secrets.token_hex(8)}.stale")
        try:
            self.path.rename(stale)
        except FileNotFoundError:
            return
        stale.unlink(missing_ok=True)

    def _refuse(self, owner: _Owner) -> None:
        folder = self.path.parent
        raise ConfigError(
            f"--logging.run_dir {folder}: is in use by process {owner.pid} on {owner.host} since {owner.since} "
            f"({self.path}); wait for it, or give another folder, for example --logging.run_dir {folder}-2"
        )

    def _read(self) -> _Owner | None:
        if not self.path.exists():
            return None
        try:
            return read_json(self.path, _Owner, ConfigError, _ADVICE)
        except ConfigError:
            if not self.path.exists():
                return None
            raise

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with self._writing:
                if not self._show_life():
                    return

    def _show_life(self) -> bool:
        """Counts up in the file; whether the lock still is this run's."""
        if self._own is None:
            return False
        self._own.beats += 1
        aside = self.path.with_name(f"{NAME}.{self._own.key}")
        try:
            if (held := self._read()) is None or held.key != self._own.key:
                return False
            aside.write_text(json.dumps(asdict(self._own)))
            aside.replace(self.path)
        except (OSError, ConfigError):
            # a disk that is full for a while; the next beat may come through
            aside.unlink(missing_ok=True)
        return True


def _linked(aside: Path, path: Path) -> bool:
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:
        # a file system without hard links
        try:
            with open(path, "x") as stream:
                stream.write(aside.read_text())
        except FileExistsError:
            return False
    return True


def _space() -> str:
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(numbering)}" if boot.exists() and numbering.is_symlink() else ""


def _start_of(pid: int) -> str | None:
    """When a process began; None where there is none, or what is left of it is a zombie. "" where no more is known of
    it than that it runs."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return ""
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
