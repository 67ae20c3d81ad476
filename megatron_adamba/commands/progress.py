"""A bar with a total and the time left, on standard error, where that is a terminal; it goes when the work is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def on_terminal() -> bool:
    """Whether a bar would be seen."""
    return sys.stderr.isatty()


class Bar:
    """What one piece of work has done of a total. Where nobody would see it, nothing is written."""

    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)

    def advance(self, count: int = 1) -> None:
        self._progress.update(self._task, advance=count)

    def expect(self, total: int) -> None:
        """The total, where it becomes known on the way."""
        self._progress.update(self._task, total=total)

    def turn_to(self, what: str) -> None:
        """What comes next takes an unknown time."""
        self._progress.reset(self._task, total=None, description=what)


@contextmanager
def progress_bar(what: str, total: int | None, unit: str, console: Console | None = None) -> Iterator[Bar]:
    """unit: what is counted, in the plural; `bytes` are shown with their speed. console: standard error by default."""
    shown = on_terminal() if console is None else console.is_terminal
    done: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit)]
    if unit == "bytes":
        done = [DownloadColumn(), TransferSpeedColumn()]
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *done,
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    console = Console(stderr=True) if console is None else console
    # what is printed to standard output meanwhile stays there
    with Progress(*columns, console=console, transient=True, disable=not shown, redirect_stdout=False) as progress:
        yield Bar(progress, what, total)
