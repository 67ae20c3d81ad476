"""Which documents, or which part of the only one, are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from megatron_adamba.data.corpus import Read, iterate_documents
from megatron_adamba.data.corpus_files import LeftOut

_BREAKS = ("\n\n", "\n", ". ", " ")
"""where the only document may be cut, best first"""
_DRAWS = 2.0**64
_REACH = 0.2
"""share of the held-out part by which a cut may move to reach a break"""


def split_documents(
    inputs: Iterable[str],
    json_key: str,
    validation_fraction: float,
    left_out: LeftOut,
    read: Read = lambda num_bytes: None,
) -> Iterator[tuple[str, bool]]:
    """Yields (text, is it held out) of every document of all inputs, a function of the documents alone.

    A document is held out where its draw, a function of its id, is under `validation_fraction`. Where no document of a
    small corpus is, the one of smallest draw is held out (of those that are no more than half of the text), and of a
    single document the tail; where all are, the one of largest draw is trained on. A fraction of 0 holds nothing out.

    Raises DataError: see `iterate_documents`.
    """
    waiting: list[tuple[int, str]] = []
    sides: set[bool] = set()
    limit = validation_fraction * _DRAWS
    for spec in inputs:
        for identity, text in iterate_documents(spec, json_key, left_out, read):
            draw = _draw(identity)
            if len(sides) == 2 or not validation_fraction:
                yield text, draw < limit
                continue
            waiting.append((draw, text))
            sides.add(draw < limit)
            if len(sides) == 2:
                yield from ((text, draw < limit) for draw, text in waiting)
                waiting.clear()
    if len(sides) < 2 and waiting:
        yield from _of_one_side(waiting, True in sides, validation_fraction)


def is_validation(identity: str, validation_fraction: float) -> bool:
    """Whether the document of this id is held out of a corpus that leaves neither side empty."""
    return _draw(identity) < validation_fraction * _DRAWS


def _draw(identity: str) -> int:
    """Of a document's id, uniform in [0, 2^64)."""
    digest = hashlib.blake2b(identity.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _of_one_side(documents: list[tuple[int, str]], held_out: bool, fraction: float) -> Iterator[tuple[str, bool]]:
    if len(documents) == 1:
        text = documents[0][1]
        place = _cut(text, fraction)
        yield from ((part, is_tail) for part, is_tail in ((text[:place], False), (text[place:], True)) if part)
        return
    if held_out:
        chosen = max(range(len(documents)), key=lambda place: documents[place][0])
    else:
        half = sum(len(text) for _, text in documents) / 2
        small = [place for place, (_, text) in enumerate(documents) if len(text) <= half]
        chosen = min(small, key=lambda place: documents[place][0])
    for place, (_, text) in enumerate(documents):
        yield text, held_out != (place == chosen)


def _cut(text: str, fraction: float) -> int:
    """Where the held-out tail begins: behind the last good break before, near the fraction's place."""
    place = max(min(round(len(text) * (1 - fraction)), len(text) - 1), min(1, len(text)))
    reach = max(int(len(text) * fraction * _REACH), 1)
    for mark in _BREAKS:
        found = text.rfind(mark, max(place - reach, 0), place)
        if found > 0:
            return found + len(mark)
    return place
