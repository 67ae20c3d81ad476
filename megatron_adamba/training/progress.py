"""Live progress on rank 0: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunConsole(Console):
    """Goes quiet where its reader goes away, as behind `| head`: a run does not end for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        logging.getLogger("megatron_adamba").warning("nobody reads the output any more; the run goes on")


class ProgressView:
    """Shows step, loss, width, tokens/s, MFU and time left."""

    def __init__(self, console: Console, steps: int, first_step: int, live: bool) -> None:
        self.console, self.steps = console, steps
        self._bar: Progress | None = None
        if live and console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=first_step)

    def update(self, record: dict[str, Any], logged: bool) -> None:
        """record: of the step just taken; `logged` marks the steps that get a line where no bar can be drawn."""
        text = (
            f"loss {record['loss']:.4f}  width {record['width']}  {record['tokens_per_second']:,.0f} tok/s  "
            f"MFU {record['mfu']:.1%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif logged:
            eta = record["seconds_left"]
            line = f"step {record['step']:>6}/{self.steps}  {text}  {int(eta // 60)}:{int(eta % 60):02d} left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
