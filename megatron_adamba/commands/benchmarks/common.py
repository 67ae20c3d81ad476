"""What every benchmark shares: rows and their table, timing side by side, comparison before timing, subprocesses."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_adamba.errors import AdambaError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""largest difference that passes as equal, as a share of the tensor's largest magnitude"""


class ComparisonError(AdambaError):
    """The two sides of a comparison do not compute the same thing, so their times mean nothing."""


@dataclass(frozen=True)
class Row:
    """One line of a result. `ratio` above 1 means that ours is better; None where the line is a figure only."""

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None


def print_rows(title: str, rows: list[Row], console: Console | None = None) -> None:
    """The rows as a table, on standard output by default."""
    # without rules, so that long names fit into the 80 columns of a log
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold")
    for column in ("ours", "peer", "unit", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        peer = "" if row.peer is None else _short(row.peer)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, _short(row.ours), peer, row.unit, ratio)
    (console or Console()).print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def write_rows(path: str, rows: list[Row]) -> None:
    """The rows as a JSON list."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def require_close(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> None:
    """Raises ComparisonError where the sides differ by more than `tolerance` of the peer's largest magnitude."""
    if ours.shape != peer.shape:
        raise ComparisonError(f"{what}: shapes {tuple(ours.shape)} and {tuple(peer.shape)}; nothing was timed")
    scale = peer.abs().max().item()
    difference = (ours.double() - peer.double()).abs().max().item()
    if not difference <= tolerance * scale:
        raise ComparisonError(f"{what}: ours and the peer differ by {difference:.3g} of {scale:.3g}; nothing was timed")


def require_small_error(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> None:
    """Raises ComparisonError where the difference's norm is more than `tolerance` of the peer's norm."""
    share = ((ours.double() - peer.double()).norm() / peer.double().norm()).item()
    if not share <= tolerance:
        raise ComparisonError(f"{what}: ours and the peer differ by {share:.3g} of their norm; nothing was timed")


def gradient_of(leaf: Tensor) -> Tensor:
    """Behind a backward pass that reached it."""
    assert leaf.grad is not None
    return leaf.grad


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, the sides taking turns, so that a busy machine disturbs them alike."""
    for _ in range(warmup):
        for call in sides.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            times[name].append(seconds(call))
    return times


def time_row(name: str, ours: list[float], peer: list[float], compared: bool = True) -> Row:
    """Medians in milliseconds; the ratio is the median over pairs taken one after the other."""
    ratio = statistics.median(theirs / mine for mine, theirs in zip(ours, peer)) if compared else None
    return Row(name, 1e3 * statistics.median(ours), 1e3 * statistics.median(peer), "ms", ratio)


def matmul_rate(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Floating-point operations per second of a square matmul, median."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = interleaved({"matmul": lambda: left @ right}, repeats)["matmul"]
    return 2 * size**3 / statistics.median(times)


_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD (malloc.h)"""


class PeakMemory:
    """MiB that this process has come to hold, at most, since the object was made.

    Linux with glibc. Read from /proc: `ru_maxrss` of a fresh process starts at what its parent held.
    """

    def __init__(self) -> None:
        # memory that was freed before but kept for reuse would hide what comes now, so from here on every block of
        # 64 KiB or more is mapped, and unmapped, by itself
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_MMAP_THRESHOLD, 1 << 16)
        allocator.malloc_trim(0)
        # restarts the kernel's high-water mark
        Path("/proc/self/clear_refs").write_text("5")
        self.start = _status_kib("VmRSS")

    def added(self) -> float:
        """At least one page, so that ratios exist."""
        return max(_status_kib("VmHWM") - self.start, 4) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ComparisonError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def in_subprocess(call: Callable, *arguments):
    """The result of `call(*arguments)` in a fresh process; both must be importable and picklable."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()
