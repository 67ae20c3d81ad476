"""What was done to a checkpoint: a list in `surgery.json` that travels with it, the first operation first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_adamba.errors import CheckpointError

HISTORY_FILE = "surgery.json"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The operations so far; an empty list where none was recorded. Raises CheckpointError for a damaged file."""
    path = folder / HISTORY_FILE
    if not path.exists():
        return []
    try:
        history = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); restore the file or delete it") from None
    if not _is_history(history):
        raise CheckpointError(f"{path}: damaged (not a list of operations); restore the file or delete it")
    return history


def trained_history(checkpoint: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a training checkpoint, by its `state.json`: the operations before the run, and the run's own training.

    Empty for a run that began with random weights. Raises CheckpointError.
    """
    history = state.get("history", [])
    if not _is_history(history):
        raise CheckpointError(f"{checkpoint}: its history is no list of operations; use an earlier checkpoint")
    counters, train = state.get("counters", {}), state.get("config", {}).get("train", {})
    if not history or not counters.get("step"):
        return history
    arguments = {"phase": train.get("phase"), "steps": counters["step"], "samples": counters.get("consumed_samples")}
    entry = {"operation": "train", "arguments": arguments, "source": {"path": str(checkpoint), "layout": "training"}}
    return [*history, entry]


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def extended_history(source: Path, operation: str, arguments: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    """The source's history and one operation more. layout: of the source's files. Two equal calls record the same."""
    entry = {"operation": operation, "arguments": arguments, "source": {"path": str(source), "layout": layout}}
    return [*read_history(source), entry]
