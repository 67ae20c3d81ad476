"""Operations of adamba surgery on a synthetic checkpoint, beside `cp` plus fsync of the files that they write.

Each runs as a process of its own. What a side is about to read is first dropped from the page cache and nothing is left
to be written back, so both read from the disk; both end when the disk has all of it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_adamba.checkpoint.verify import verify
from megatron_adamba.commands.benchmarks.common import ComparisonError, Row, seconds
from megatron_adamba.commands.benchmarks.surgery_sources import hidden_of, write_gpt_oss, write_nanochat, write_own
from megatron_adamba.errors import StorageError
from megatron_adamba.surgery.gpt_oss_config import HUGGING_FACE, OPENAI

GIGABYTES, QUICK_GIGABYTES, PAIRS = 8.0, 0.01, 3
NEEDED = 5.0
"""disk, in units of the source: that, what an expansion makes of it, and a copy"""
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Operation:
    """One subcommand. words: those in front of SRC and DST, and those behind; made of (channels, blocks)."""

    name: str
    before: tuple[str, ...]
    after: Callable[[int, int], list[str]] = lambda hidden, blocks: []


@dataclass(frozen=True)
class Source:
    """A checkpoint that `write(folder, bytes)` makes, and what is done with it."""

    write: Callable[[Path, float], int]
    operations: tuple[Operation, ...]


SOURCES = (
    Source(
        write_own,
        (
            Operation("graft", ("graft",), lambda _, pairs: ["--pattern", "TEM" * pairs]),
            Operation("expand", ("expand",), lambda hidden, _: ["--hidden", str(hidden * 5 // 4)]),
            Operation("extract", ("extract",), lambda hidden, _: ["--width", str(hidden // 2)]),
        ),
    ),
    Source(write_nanochat, (Operation("import nanochat", ("import", "nanochat")),)),
    Source(
        partial(write_gpt_oss, layout_name=OPENAI, packed=True),
        (Operation("import gpt-oss MXFP4", ("import", "gpt-oss")),),
    ),
    Source(
        partial(write_gpt_oss, layout_name=OPENAI, packed=False),
        (Operation("import gpt-oss bf16", ("import", "gpt-oss")),),
    ),
    Source(
        partial(write_gpt_oss, layout_name=HUGGING_FACE, packed=False),
        (Operation("import hf bf16", ("import", "hf")),),
    ),
)


def measure(quick: bool, gigabytes: float | None = None, folder: Path | None = None) -> list[Row]:
    """Rates, peaks and sizes of every operation. folder: scratch, on the disk to be measured."""
    num_bytes = 1e9 * (gigabytes or (QUICK_GIGABYTES if quick else GIGABYTES))
    place = folder or Path("runs")
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < NEEDED * num_bytes:
        raise StorageError(f"{place}: {NEEDED * num_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-surgery-", dir=place) as scratch:
        for source in SOURCES:
            checkpoint = Path(scratch) / "source"
            blocks = source.write(checkpoint, num_bytes)
            for operation in source.operations:
                words = operation.after(hidden_of(num_bytes), blocks)
                rows += _measure_operation(operation, words, Path(scratch), 1 if quick else PAIRS)
            shutil.rmtree(checkpoint)
    return rows


def _measure_operation(operation: Operation, words: list[str], scratch: Path, pairs: int) -> list[Row]:
    source, made, spare = scratch / "source", scratch / "made", scratch / "spare"
    command = [sys.executable, "-m", "megatron_adamba", "surgery", *operation.before, str(source)]
    peaks = [_run([*command, str(made), *words])]
    verify(made)
    written = _size(made)
    sides = {"ours": lambda: peaks.append(_run([*command, str(spare), *words])), "peer": lambda: _copy(made, spare)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(pairs):
        # the first of a pair finds memory as the other side left it, so they take turns in that too
        for side in list(sides)[:: 1 if pair % 2 else -1]:
            _settle(scratch)
            rates[side].append(written / 1e6 / seconds(sides[side]))
            shutil.rmtree(spare)
    shutil.rmtree(made)
    ours, peer = (statistics.median(side) for side in rates.values())
    ratio = statistics.median(mine / theirs for mine, theirs in zip(*rates.values()))
    title = f"surgery {operation.name}"
    return [
        Row(f"{title} write rate", ours, peer, "MB/s", ratio),
        Row(f"{title} peak anonymous memory", max(peaks) / 1e6, None, "MB", None),
        Row(f"{title} source", _size(source) / 1e6, None, "MB", None),
        Row(f"{title} written", written / 1e6, None, "MB", None),
    ]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _settle(scratch: Path) -> None:
    """Nothing waits to be written to the disk, and no page of our files is in memory."""
    os.sync()
    for file in scratch.glob("*/*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    files = sorted(source.iterdir())
    subprocess.run(["cp", "--reflink=never", *files, target], check=True)
    for file in files:
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _run(command: list[str]) -> int:
    """Bytes of the largest anonymous resident memory of the process. Raises ComparisonError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(_SAMPLE_SECONDS)
        out, error = child.communicate()
    if child.returncode:
        raise ComparisonError(f"{' '.join(command)}: {(error or out).strip()}; nothing was timed")
    return peak


def _anonymous_bytes(process: int) -> int:
    """0 where the process is ending."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0
