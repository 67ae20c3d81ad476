"""Small checks that every config section uses; each says the flag, the rule and a value that works."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from megatron_adamba.errors import ConfigError

LARGEST_SEED = 2**63 - 1


def positive(flag: str, value: float) -> None:
    # not-a-number is neither above nor below
    if not value > 0:
        raise ConfigError(f"{flag} {value}: must be above 0, for example {flag} 1")


def in_range(flag: str, value: float, low: float, high: float) -> None:
    """Both ends included."""
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must lie between {low} and {high}, for example {flag} {low}")


def count(flag: str, value: int, most: int) -> None:
    """At least one, and no more than can ever be meant."""
    positive(flag, value)
    in_range(flag, value, 1, most)


def check_seed(flag: str, value: int) -> None:
    """Every generator takes those."""
    in_range(flag, value, 0, LARGEST_SEED)


def can_be_file(flag: str, path: str | Path | None) -> None:
    """Of a file to write, before the work for it is done: no folder, and in none that is a file."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; give the name of a file, for example {flag} {path / 'output'}")
    parent = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ConfigError(f"{flag} {path}: {parent} is no folder; give a path in one")


def one_of(flag: str, value: object, allowed: Iterable[object]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        near = nearest(str(value), [str(choice) for choice in allowed]) or str(allowed[0])
        raise ConfigError(f"{flag} {value}: must be one of {choices}; for example {flag} {near}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name a user most likely meant, or None."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
