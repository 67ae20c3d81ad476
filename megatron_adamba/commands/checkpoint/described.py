"""What is said of a checkpoint and its tensors in a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_adamba.config.script import as_settings

if TYPE_CHECKING:
    from megatron_adamba.checkpoint.offline import OpenCheckpoint


def described(infos: Iterable[Any]) -> str:
    """`34 tensors, 5,754,340 elements, 23.0 MB`."""
    from rich.filesize import decimal

    infos = list(infos)
    count, size = sum(info.numel for info in infos), sum(info.num_bytes for info in infos)
    return f"{counted(len(infos), 'tensor')}, {counted(count, 'element')}, {decimal(size)}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def where(checkpoint: OpenCheckpoint) -> str:
    """Step and layout of a training checkpoint, as part of a line."""
    layout = layout_of(checkpoint)
    if layout is None:
        return ""
    parts = " x ".join(f"{name} {layout[name]}" for name in ("tp", "dp") if layout[name] is not None)
    step, ranks = checkpoint.state["counters"].get("step"), counted(layout["ranks"], "rank")
    return f" at step {step}, written by {ranks} ({parts})"


def layout_of(checkpoint: OpenCheckpoint) -> dict[str, Any] | None:
    """{"ranks", "tp", "dp"} of a training checkpoint; None for tp and dp where its config does not tell."""
    if checkpoint.tensors is None:
        return None
    ranks = len(list(checkpoint.folder.glob("__*_0.distcp")))
    said = checkpoint.state.get("layout", checkpoint.config.get("parallel"))
    tp = said.get("tp") if isinstance(said, dict) else None
    if isinstance(tp, int) and tp > 0 and ranks % tp == 0:
        return {"ranks": ranks, "tp": tp, "dp": ranks // tp}
    return {"ranks": ranks, "tp": None, "dp": None}


def reworded(text: str) -> str:
    """What a run is told to resume from is here simply named."""
    return as_settings(text).replace("give --resume ", "give ")
