"""Files that evaluations and runs leave behind, read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_adamba.errors import DataError
from megatron_adamba.schema import Count, Finite, JsonObject, check_value, read_json

_NUMBERS = ("loss", "loss_full", "grad_norm", "lr_factor", "tokens_per_second", "eval_nats_per_token", "eval_width")
_NEEDED = {"eval_width": "eval_nats_per_token"}


@dataclass(frozen=True)
class ReportedRow:
    """What eval.json says of one plan, as far as anybody reads it back."""

    width: Count
    nats_per_token: Finite
    exit_layer: Count | None = None
    bits_per_byte: Finite | None = None
    bytes: Count | None = None


_Rows = Annotated[list[ReportedRow], Field(min_length=1)]


def read_rows(path: Path, flag: str = "") -> list[ReportedRow]:
    """Rows of an eval.json; flag: in front of the path in messages. Raises DataError."""
    advice = "not an eval.json; run adamba evaluate --json first"
    try:
        rows = read_json(path, JsonObject, DataError, advice).get("rows")
        return check_value(rows, _Rows, f"{path}: rows", DataError, advice)
    except DataError as error:
        raise DataError(f"{flag}{error}") from None


def checked_metrics(records: Sequence[Any], path: Path) -> list[JsonObject]:
    """Records of a metrics.jsonl whose numbers are numbers. Raises DataError naming the first that is not."""
    kind = dict[str, Any]
    for number, record in enumerate(records, 1):
        where, advice = f"--metrics {path}: record {number}", "give the metrics.jsonl of a run"
        values = check_value(record, kind, where, DataError, advice)
        check_value(values.get("step", 0), Count, f"{where}: step", DataError, advice)
        for name in _NUMBERS:
            check_value(values.get(name), float | None, f"{where}: {name}", DataError, advice)
        if any(name in values and (values[name] is None or values.get(need) is None) for name, need in _NEEDED.items()):
            raise DataError(f"{where}: an evaluation without eval_width and eval_nats_per_token; {advice}")
        if "loss" in values or "eval_width" in values:
            check_value(values.get("step"), Count, f"{where}: step", DataError, advice)
    return list(records)
