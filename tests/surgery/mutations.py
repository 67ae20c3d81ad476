"""Files with some of them changed at random: values of JSON, and bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 64, 10**9, 2**40, 2**63, 2**64, 10**30, -(2**70), 0.5, -0.5, 1e308, 1e-320,
    float("inf"), float("nan"), "", "x", "1", "\ud800", "\x00", "/etc/passwd", "../x", "a" * 5000, [], {}, [[]], [None],
    [1], ["x"], {"a": 1}, [10**9] * 3, ["full_attention"], {"rope_type": "yarn"}, [[[[[[]]]]]],
)  # fmt: skip


def mutated_values(random_: random.Random, values: Any) -> Any:
    """A copy with one to three places changed, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(random_.randint(1, 3)):
        place = values
        while True:
            if isinstance(place, dict) and place:
                key = random_.choice(list(place))
            elif isinstance(place, list) and place:
                key = random_.randrange(len(place))
            else:
                break
            if isinstance(place[key], (dict, list)) and place[key] and random_.random() < 0.7:
                place = place[key]
                continue
            change = random_.random()
            if change < 0.75:
                place[key] = copy.deepcopy(random_.choice(VALUES))
            elif change < 0.85:
                del place[key]
            elif isinstance(place, dict):
                place[random_.choice(["x", "model", "", "\ud800"])] = copy.deepcopy(random_.choice(VALUES))
            else:
                place.append(copy.deepcopy(random_.choice(VALUES)))
            break
    return values


def mutated_json(random_: random.Random, values: Any) -> bytes:
    """Mostly other values, now and then another text."""
    kind = random_.random()
    if kind < 0.85:
        return json.dumps(mutated_values(random_, values)).encode()
    if kind < 0.9:
        return random_.choice([b"", b"[", b"{" * 3000, b"[" * 10**5, b"\xff\xfe{}", b"null", b"[]", b'{"a":' * 500])
    return mutated_bytes(random_, json.dumps(values).encode())


def mutated_bytes(random_: random.Random, content: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Some bytes changed, or some taken out or put in, between first and last."""
    changed, last = bytearray(content), len(content) if last is None else last
    for _ in range(random_.choice([1, 1, 2, 4])):
        place = random_.randrange(first, max(min(last, len(changed)), first + 1))
        kind = random_.random()
        if kind < 0.7 and place < len(changed):
            changed[place] = random_.randrange(256)
        elif kind < 0.8:
            del changed[place : place + random_.randint(1, 20)]
        elif kind < 0.9:
            changed[place:place] = random_.randbytes(random_.randint(1, 20))
        else:
            del changed[place:]
    return bytes(changed)
