"""What was done to a checkpoint: a list in `surgery.json` that travels with it, the first operation first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import JsonObject, check_value, read_json

HISTORY_FILE = "surgery.json"
Operations = list[JsonObject]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The operations so far; an empty list where none was recorded. Raises CheckpointError for a damaged file."""
    path = folder / HISTORY_FILE
    if not path.exists():
        return []
    return read_json(path, Operations, CheckpointError, "must be a list of operations; restore the file or delete it")


def trained_history(checkpoint: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a training checkpoint, by its `state.json`: the operations before the run, and the run's own training.

    Empty for a run that began with random weights. Raises CheckpointError.
    """
    advice = "use an earlier checkpoint"
    told = lambda value, kind, name: check_value(value, kind, f"{checkpoint}: {name}", CheckpointError, advice)
    history = told(state.get("history", []), Operations, "history")
    counters = told(state.get("counters", {}), JsonObject, "counters")
    train = told(told(state.get("config", {}), JsonObject, "config").get("train", {}), JsonObject, "config.train")
    if not history or not counters.get("step"):
        return history
    arguments = {"phase": train.get("phase"), "steps": counters["step"], "samples": counters.get("consumed_samples")}
    entry = {"operation": "train", "arguments": arguments, "source": {"path": str(checkpoint), "layout": "training"}}
    return [*history, entry]


def extended_history(source: Path, operation: str, arguments: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    """The source's history and one operation more. layout: of the source's files. Two equal calls record the same."""
    entry = {"operation": operation, "arguments": arguments, "source": {"path": str(source), "layout": layout}}
    return [*read_history(source), entry]
