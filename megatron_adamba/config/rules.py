"""Small checks that every config section uses; each says the flag, the rule and a value that works."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from megatron_adamba.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONGEST_NAME = 200
"""bytes, so that what is added while it is written fits too"""
LARGEST_SEED = 2**63 - 1
LARGEST = 2**31 - 1
"""what sizes and counts are held against: a larger one is a slip of the hand, and would be waited for"""


def positive(flag: str, value: float, example: float | None = None) -> None:
    """Above 0 and finite; whole numbers up to `LARGEST`. example: one that works, 1 where it is left out."""
    shown = _shown(example, 1)
    if not 0 < value < math.inf:
        rule = "must be above 0" if value <= 0 else "must be above 0 and finite"
        raise ConfigError(f"{flag} {value}: {rule}, for example {flag} {shown}")
    if isinstance(value, int) and value > LARGEST:
        raise ConfigError(f"{flag} {value}: must be at most {LARGEST}, for example {flag} {shown}")


def in_range(flag: str, value: float, low: float, high: float, example: float | None = None) -> None:
    """Both ends included; both are finite. example: one that works, the low end where it is left out."""
    if not low <= value <= high:
        shown = _shown(example, low)
        raise ConfigError(f"{flag} {value}: must lie between {low} and {high}, for example {flag} {shown}")


def at_least(flag: str, value: float, low: float, example: float | None = None, infinite: bool = False) -> None:
    """infinite: whether infinity is a value too; example: one that works, the low end where it is left out."""
    if not low <= value or (value == math.inf and not infinite):
        finite = "" if infinite or value < low else " and finite"
        shown = _shown(example, low)
        raise ConfigError(f"{flag} {value}: must be at least {low}{finite}, for example {flag} {shown}")


def _shown(example: float | None, otherwise: float) -> str:
    return f"{otherwise if example is None else example}"


def usual(section: DataclassInstance, name: str) -> float | None:
    """What a field of a section holds where nothing is said: a value that works; None where that is none."""
    found = next(entry for entry in fields(section) if entry.name == name)
    return None if found.default is MISSING else found.default


def file_to_write(flag: str, path: str | None, example: str) -> None:
    """Found out before the work that is to be written there; None is nothing. example: a name that works in a
    folder."""
    if path is None:
        return
    if path and os.path.isdir(path):
        inside = os.path.join(path, example)
        raise ConfigError(
            f"{flag} {path}: is a folder; give the name of a file; a file must be named, as {flag} {inside}"
        )
    if not path or path.endswith("/"):
        raise ConfigError(f"{flag} {path!r}: a file must be named, for example {flag} {os.path.join(path, example)}")
    if len(os.fsencode(os.path.basename(path))) > LONGEST_NAME:
        raise ConfigError(f"{flag}: the name is longer than {LONGEST_NAME} bytes; for example {flag} {example}")
    folder_to_write(flag, os.path.dirname(path))


def folder_to_write(flag: str, path: str) -> None:
    """It may be made; nothing that is no folder may stand on the way."""
    there = os.path.abspath(path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f"{flag}: {there} is no folder; for example {flag} {os.path.dirname(there)}/NAME")


def below_one(flag: str, value: float) -> None:
    """From 0 on, 1 excluded."""
    if not 0 <= value < 1:
        raise ConfigError(f"{flag} {value}: must lie between 0 and 1, 1 itself excluded, for example {flag} 0.9")


def count(flag: str, value: int, most: int) -> None:
    """At least one, and no more than can ever be meant."""
    positive(flag, min(value, 1))
    in_range(flag, value, 1, most)


def check_seed(flag: str, value: int) -> None:
    """Every generator takes those."""
    in_range(flag, value, 0, LARGEST_SEED)


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
