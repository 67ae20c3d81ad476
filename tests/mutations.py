"""Damage by the dozen from a fixed seed, for tests that allow the clean error alone."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

HOSTILE = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**40,
    2**63,
    10**30,
    "",
    "x",
    "..",
    "/etc/passwd",
    "a\u0000b",
    "\u202e",
    "9" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, "x", None],
)
"""values that stand in for others"""


def mutated_json(source: random.Random, values: Any) -> bytes:
    """One to three changes of a JSON document, in its values, its keys or its bytes."""
    values = copy.deepcopy(values)
    for _ in range(source.randint(1, 3)):
        values = _changed(source, values)
    content = json.dumps(values).encode()
    draw = source.random()
    if draw < 0.1:
        return mutated_bytes(source, content)
    if draw < 0.12:
        return b"[" * 200_000
    if draw < 0.14:
        deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
        return content.replace(b"null", deep, 1) if b"null" in content else deep
    return content


def mutated_bytes(source: random.Random, content: bytes) -> bytes:
    """Flipped, cut, doubled, or filled with something else."""
    if not content:
        return b"x"
    changed = bytearray(content)
    kind = source.randrange(5)
    place = source.randrange(len(changed))
    if kind == 0:
        for _ in range(source.randint(1, 8)):
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    elif kind == 1:
        del changed[place:]
    elif kind == 2:
        changed[place:place] = changed[place : place + source.randint(1, 64)]
    elif kind == 3:
        size = source.choice((1, 2, 4, 8))
        changed[place : place + size] = source.choice((b"\xff", b"\x00", b"\x7f")) * size
    else:
        changed[place:place] = bytes(source.randrange(256) for _ in range(source.randint(1, 16)))
    return bytes(changed)


def _changed(source: random.Random, values: Any) -> Any:
    places = list(_places(values))
    if not places:
        return copy.deepcopy(source.choice(HOSTILE))
    holder, key = source.choice(places)
    kind = source.random()
    if kind < 0.6:
        holder[key] = copy.deepcopy(source.choice(HOSTILE))
    elif kind < 0.75:
        del holder[key]
    elif kind < 0.85 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += source.choice((-1, 1, 7, -holder[key] - 1, 2**32))
    elif isinstance(holder, dict):
        holder[source.choice(("x", "", "..", "\u0000", str(key) * 2))] = copy.deepcopy(holder[key])
    else:
        holder.append(copy.deepcopy(holder[key]))
    return values


def _places(values: Any):
    if isinstance(values, dict):
        entries = list(values.items())
    elif isinstance(values, list):
        entries = list(enumerate(values))
    else:
        return
    for key, part in entries:
        yield values, key
        yield from _places(part)
