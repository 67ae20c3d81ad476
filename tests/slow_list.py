"""Which tests `make test` leaves out: those of `slow.txt`, beside those that are marked where they stand."""

from __future__ import annotations

from pathlib import Path


def slow_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Beginnings of the names of slow tests, and of those among them that are quick all the same (`slow.txt`)."""
    lines = [line.strip() for line in (Path(__file__).parent / "slow.txt").read_text().splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    slow = tuple(line for line in named if not line.startswith("+"))
    return slow, tuple(line[1:] for line in named if line.startswith("+"))
