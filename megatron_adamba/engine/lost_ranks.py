"""Why a connection to other ranks was lost: one of them failed and says so, is gone without a word, or hangs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_adamba.engine.job import JobBoard, RankInfo
from megatron_adamba.errors import AdambaError, LostRankError
from megatron_adamba.files import write_atomically
from megatron_adamba.schema import Count, parse_json, read_json

PATIENCE = 5.0
"""seconds in which ranks that lost a connection find each other and read what a failing one left; launchers leave a
rank 30 s after the SIGTERM that follows a failure"""
_PAUSE, _FIRST_RANKS = 0.1, 1.0
"""seconds between looks; seconds that the first rank has to tell of an error that all ranks raise"""
_RESUME = "start again with --resume auto"


@dataclass
class Failure:
    """What a rank left behind that failed by itself."""

    rank: Count
    text: str


class FailureNote:
    """Where a failing rank leaves its text for the others: in the run's folder, which all of them see.

    The first rank of a job calls `clear` before any other can fail.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "logs" / "failure.json"

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def leave(self, rank: int, text: str) -> bool:
        """Whether this is the first failure: the one that people are told."""
        if self.read() is not None:
            return False
        aside = self.path.with_name(f"{self.path.name}.{rank}")
        try:
            write_atomically(aside, json.dumps(asdict(Failure(rank, text))).encode())
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError:
            # a full disk, or one without links: better told twice than never
            return True
        finally:
            aside.unlink(missing_ok=True)
        return True

    def tells(self, rank: int, error: AdambaError) -> bool:
        """Whether this rank is the one that tells people of an error, which may have reached all ranks: the first rank
        where it is among them, else the one that failed first."""
        if isinstance(error, LostRankError) and not error.first_survivor:
            return False
        end = time.monotonic() + (_FIRST_RANKS if rank else 0)
        while time.monotonic() < end:
            if self.read() is not None:
                return False
            time.sleep(_PAUSE)
        return self.leave(rank, str(error))

    def read(self) -> Failure | None:
        if not self.path.exists():
            return None
        try:
            return read_json(self.path, Failure, LostRankError, "")
        except LostRankError:
            return None


@dataclass
class _Process:
    """Where a rank runs."""

    host: str
    pid: Count

    @classmethod
    def this(cls) -> _Process:
        return cls(f"{socket.gethostname()} {_numbering()}", os.getpid())

    @property
    def dead(self) -> bool:
        """Known to be; a process elsewhere never is."""
        return self.host == self.this().host and _state(self.pid) in (None, "Z", "X")


@contextlib.contextmanager
def lost_ranks_named(info: RankInfo, note: FailureNote | None = None) -> Iterator[None]:
    """Turns a collective that failed because of another rank into a LostRankError that says which, and what it left in
    its note."""
    board = JobBoard()
    board.write(f"process/{info.rank}", json.dumps(asdict(_Process.this())))
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, AdambaError) or info.world_size == 1 or not _is_lost_connection(error):
            raise
        logging.getLogger("megatron_adamba").error("lost a connection", exc_info=error)
        raise _explained(info, board, note) from None


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error)
    marks = ("gloo/transport", "Connection closed by", "Connection reset by", "ncclRemote", "collective operation time")
    return isinstance(error, dist.DistNetworkError) or any(mark in text for mark in marks)


def _explained(info: RankInfo, board: JobBoard, note: FailureNote | None) -> LostRankError:
    """Waits for the others to report, or for the note of one that failed, as long as patience goes."""
    board.write(f"alive/{info.rank}", "1")
    others = [rank for rank in range(info.world_size) if rank != info.rank]
    end, settled = time.monotonic() + PATIENCE, False
    while not settled and time.monotonic() < end:
        time.sleep(_PAUSE)
        silent, dead = _silent_and_dead(board, others)
        # without the store, its keeper is gone: the first rank, in a job without an agent
        settled = silent is None or set(silent) == set(dead)
        failure = note.read() if note is not None else None
        if failure is not None and failure.rank != info.rank:
            # people have been told by the rank itself
            return LostRankError(f"rank {failure.rank} failed: {failure.text}", first_survivor=False)
    if silent is None:
        silent = dead = [0] if info.rank else []
    if silent and not dead:
        here = _Process.this().host
        processes = {rank: _process_of(board, rank) for rank in silent}
        dead = [rank for rank, process in processes.items() if process is None or process.host != here]
    first = info.rank == min(set(range(info.world_size)) - {*silent, *dead}, default=info.rank)
    return LostRankError(_described(dead, silent), first_survivor=first)


def _silent_and_dead(board: JobBoard, others: list[int]) -> tuple[list[int] | None, list[int]]:
    """Ranks that report no lost connection, None where the store is gone; of them those whose process is known to be
    no more, to this rank or to one beside them."""
    alive = board.written([f"alive/{rank}" for rank in others])
    if alive is None:
        return None, []
    silent = [rank for rank in others if f"alive/{rank}" not in alive]
    for rank in silent:
        process = _process_of(board, rank)
        if process is not None and process.dead:
            board.write(f"dead/{rank}", "1")
    told = board.written([f"dead/{rank}" for rank in silent]) or set()
    return silent, [rank for rank in silent if f"dead/{rank}" in told]


def _described(dead: list[int], silent: list[int]) -> str:
    """dead: known to be, or not to be reached; silent: all that did not report a lost connection."""
    if dead:
        return (
            f"{_named(dead)} ended without a word (killed, out of memory, or its machine is gone): its log is in "
            f"RUN/logs; {_RESUME}"
        )
    if silent:
        return (
            f"{_named(silent)} still runs and does not answer (it hangs, or is stopped): its log is in RUN/logs; end "
            f"the job, and {_RESUME}"
        )
    return f"the connection between ranks broke, though all of them run: look at the network, and {_RESUME}"


def _named(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"


def _process_of(board: JobBoard, rank: int) -> _Process | None:
    text = board.read(f"process/{rank}")
    return None if text is None else parse_json(text, _Process, f"rank {rank}", LostRankError, "")


def _numbering() -> str:
    place = Path("/proc/self/ns/pid")
    return os.readlink(place) if place.is_symlink() else ""


def _state(pid: int) -> str | None:
    """A process's state as the kernel writes it, None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "?"
