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
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path}: damaged (not a list of operations); restore the file or delete it")
    return history


def extended_history(source: Path, operation: str, arguments: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    """The source's history and one operation more. layout: of the source's files. Two equal calls record the same."""
    entry = {"operation": operation, "arguments": arguments, "source": {"path": str(source), "layout": layout}}
    return [*read_history(source), entry]
