"""How many times as long a `tokenizer.json` may make a text, told from the file before its library runs any of it."""

from __future__ import annotations

import base64
import math
import re
import struct
from typing import Any

MOST_GROWTH = 1000
"""times as long; what is published stays below 100"""
_STEPS = ("normalizer", "pre_tokenizer", "decoder")
_BYTES_AS_LETTERS = 4
_HARD_TO_SAY = re.compile(r"\(\?[^:]|[\^$]|\\[AbBGkKXyYzZ\d]|[*+?}]\+")
"""in an expression that may match nothing at one place of a text and not at another"""


def growth(values: dict[str, Any]) -> float:
    """An upper bound for what all steps around the model do together. values: the file."""
    return math.prod((_of(values.get(step)) for step in _STEPS), start=1.0)


def _of(step: Any) -> float:
    if not isinstance(step, dict):
        return 1
    # a Sequence holds a list of steps, under a name that depends on their kind
    inner = [part for held in step.values() if isinstance(held, list) for part in held]
    own = {"Replace": _replace, "Prepend": _prepend, "Precompiled": _precompiled, "ByteLevel": _byte_level}
    measure = own.get(str(step.get("type")))
    return (measure(step) if measure else 1) * math.prod(map(_of, inner), start=1.0)


def _replace(step: dict[str, Any]) -> float:
    written, pattern = len(step.get("content") or ""), step.get("pattern")
    plain = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(plain, str) and plain:
        return max(1, written / len(plain))
    # a pattern that matches nothing at all does so between all characters
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    return max(1, written) if isinstance(expression, str) and not _may_be_empty(expression) else 1 + written


def _may_be_empty(expression: str) -> bool:
    from tokenizers import Regex, normalizers

    if _HARD_TO_SAY.search(expression):
        return True
    at_the_start = normalizers.Replace(Regex(rf"\A(?:{expression})(?=\x01\z)"), "x")
    return at_the_start.normalize_str("\x01") != "\x01"


def _prepend(step: dict[str, Any]) -> float:
    """Once for each part of a text, which may be one character."""
    return 1 + len(step.get("prepend") or "")


def _precompiled(step: dict[str, Any]) -> float:
    """Sentencepiece's table: the length of a trie, the trie, and what it leads to, each with a zero behind it."""
    table = base64.b64decode(step.get("precompiled_charsmap") or "")
    if len(table) < 4:
        return 1
    written = table[4 + struct.unpack("<I", table[:4])[0] :]
    return max(len(part.decode(errors="replace")) for part in written.split(b"\0")) or 1


def _byte_level(step: dict[str, Any]) -> float:
    return _BYTES_AS_LETTERS
