"""A whole training run, from its settings to its model, on this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_adamba.config.cli import ParsedArguments
from megatron_adamba.engine.job import RankInfo
from megatron_adamba.engine.launch import start_distributed, stop_distributed, world_size_from_environment
from megatron_adamba.engine.lost_ranks import FailureNote, lost_ranks_named
from megatron_adamba.errors import AdambaError
from megatron_adamba.evaluation.widths import EvaluationRow
from megatron_adamba.files import as_user_error
from megatron_adamba.training.report import start_lines
from megatron_adamba.training.run import RunPlan, build_run, plan_run
from megatron_adamba.training.run_folder import RunFolder
from megatron_adamba.training.same_settings import check_same_settings
from megatron_adamba.training.trainer import Trainer

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FinishedRun:
    """What a run left."""

    folder: Path
    rows: list[EvaluationRow]
    """the last evaluation, at every width and exit; empty without validation data"""


def run_job(
    parsed: ParsedArguments,
    console: Console,
    on_error: Callable[[AdambaError, bool], object],
    listener: Listener | None = None,
    stay: bool = False,
) -> FinishedRun | None:
    """Trains to the end; None where the run failed by the user's doing and `on_error` returned.

    on_error: is called with the error, and whether this rank is the one that tells people of it, while the other ranks
    can still hear; listener: is called on rank 0 with each record of metrics.jsonl; stay: leaves the process group for
    another run of this process. Raises AdambaError for what is wrong before the ranks meet.
    """
    plan = plan_run(parsed, world_size_from_environment())
    info = start_distributed()
    try:
        check_same_settings(plan.config)
        with RunFolder(Path(plan.config.logging.run_dir), info.rank) as folder:
            note = FailureNote(folder.path)
            try:
                with lost_ranks_named(info, note):
                    return _train(parsed, plan, info, folder, console, listener)
            except Exception as error:
                if found := _user_error(error, folder.path):
                    on_error(found, note.tells(info.rank, found))
                    return None
                note.leave(info.rank, f"{type(error).__name__}: {error}")
                raise
    finally:
        if not stay:
            stop_distributed()


def _user_error(error: Exception, folder: Path) -> AdambaError | None:
    """The error of what the user or the disk did; None for a defect."""
    if isinstance(error, AdambaError):
        return error
    return as_user_error(error, str(folder)) if isinstance(error, OSError) else None


def _train(
    parsed: ParsedArguments,
    plan: RunPlan,
    info: RankInfo,
    folder: RunFolder,
    console: Console,
    listener: Listener | None,
) -> FinishedRun:
    built = build_run(plan, info)
    lines = start_lines(built, parsed)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    rows = Trainer(built, console, folder.leave, lines, listener).train()
    return FinishedRun(built.run_dir, rows)
