"""Fresh processes that measure together."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megatron_adamba.errors import AdambaError

PATIENCE = timedelta(seconds=120)
"""for one collective; a rank that is alone gives up"""


def on_ranks(function: Callable, ranks: int, *arguments):
    """What `function(rank, store, *arguments)` returns on rank 0; the first that fails ends the others. store: a file
    for the ranks to find each other by."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(theirs, rank, str(Path(folder) / "store"), function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            return _answers(ends)[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(ends: list[Connection]) -> list:
    """By rank. Raises what the first rank to fail has raised."""
    found: dict[int, object] = {}
    while len(found) < len(ends):
        for ready in wait([end for rank, end in enumerate(ends) if rank not in found]):
            rank = next(rank for rank, end in enumerate(ends) if end is ready)
            try:
                failed, answer = ends[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failed:
                raise answer if isinstance(answer, AdambaError) else RuntimeError(f"rank {rank}: {answer}")
            found[rank] = answer
    return [found[rank] for rank in range(len(ends))]


def _run_rank(answers: Connection, rank: int, store: str, function: Callable, arguments: tuple) -> None:
    try:
        answers.send((False, function(rank, store, *arguments)))
    except AdambaError as error:
        answers.send((True, error))
    except BaseException:
        answers.send((True, traceback.format_exc()))
