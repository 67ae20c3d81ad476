"""Block patterns: `"(TM)x10"`, `"Tx12 Mx8"`, `["transformer", "mamba"]` become a tuple of block letters."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_adamba.config.rules import nearest
from megatron_adamba.errors import ConfigError

BLOCK_WORDS = {"transformer": "T", "mamba": "M", "moe": "E"}
"""Words that stand for a letter, alone or as an item of a list."""

MAX_BLOCKS = 4096
"""A longer pattern is a slip of the hand; it is refused before its letters are written out."""

CUT = "|"
"""Where a pipeline stage ends, in a pattern."""

_FLAG = "--model.block_pattern"


def parse_pattern(pattern: str | Sequence[str] | None, num_layers: int | None) -> tuple[str, ...]:
    """Letters of all blocks, first to last.

    pattern: a string with letters T, M and E, parentheses and repeats `xN` after a letter or a group, spaces ignored;
        or a list of letters or words; or None, which is `num_layers` blocks of T. `|` between blocks is left out
        (`parse_cuts`).
    Raises ConfigError for an unknown letter or word, an unbalanced parenthesis, a bad repeat, or a length that is
    not `num_layers` where that is given too.
    """
    if pattern is None:
        if num_layers is None:
            raise ConfigError(f"{_FLAG} null: says nothing of the depth; add --model.num_layers 12, or --depth 12")
        letters = "T" * num_layers
    elif isinstance(pattern, str):
        letters = BLOCK_WORDS.get(pattern.strip().lower()) or _Parser(pattern).parse()
    else:
        letters = "".join(_letter_of(item) for item in pattern)
    letters = letters.replace(CUT, "")
    if not letters:
        raise ConfigError(f"{_FLAG} {pattern!r}: holds no block; for example {_FLAG} (TM)x4")
    if num_layers is not None and num_layers != len(letters):
        raise ConfigError(
            f"--model.num_layers {num_layers}: the block pattern has {len(letters)} blocks; "
            f"give --model.num_layers {len(letters)} or leave it out"
        )
    return tuple(letters)


def parse_cuts(pattern: str | Sequence[str] | None) -> tuple[int, ...] | None:
    """Where the parts between `|` begin and the last one ends, in blocks: (0, 2, 4) of "TM|TM"; None without any.

    Raises ConfigError for a part without a block, and as `parse_pattern` does.
    """
    if pattern is None or CUT not in pattern:
        return None
    letters = _Parser(pattern).parse() if isinstance(pattern, str) else "".join(_letter_of(item) for item in pattern)
    parts = letters.split(CUT)
    if not all(parts):
        raise ConfigError(f"{_FLAG} {pattern!r}: a | without a block on each side; for example {_FLAG} TM|TM")
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + len(part))
    return tuple(bounds)


def _letter_of(item: str) -> str:
    word = item.strip()
    if word in (*BLOCK_WORDS.values(), CUT):
        return word
    if word.lower() in BLOCK_WORDS:
        return BLOCK_WORDS[word.lower()]
    near = nearest(word.lower(), BLOCK_WORDS) or "transformer"
    raise ConfigError(
        f"{_FLAG}: unknown block {item!r}; blocks are T (transformer), M (mamba) and E (moe), e.g. {near}"
    )


class _Parser:
    """Recursive descent over `sequence := (item repeat?)*`, `item := letter | '(' sequence ')'`, `repeat := 'x' N`."""

    def __init__(self, text: str) -> None:
        self.text = "".join(text.split())
        self.position = 0

    def parse(self) -> str:
        letters = self._sequence()
        if self.position < len(self.text):
            raise self._error("a ')' without its '('")
        return letters

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{_FLAG} {self.text!r}: {what} at character {self.position + 1}; for example (TM)x4")

    def _peek(self) -> str:
        return self.text[self.position] if self.position < len(self.text) else ""

    def _sequence(self) -> str:
        letters = ""
        while self._peek() not in ("", ")"):
            item, count = self._item(), self._repeat()
            if len(letters) + len(item) * count > MAX_BLOCKS:
                raise self._error(f"more than {MAX_BLOCKS} blocks")
            letters += item * count
        return letters

    def _item(self) -> str:
        character = self._peek()
        if character == "(":
            self.position += 1
            inner = self._sequence()
            if self._peek() != ")":
                raise self._error("a '(' without its ')'")
            self.position += 1
            return inner
        if character not in (*BLOCK_WORDS.values(), CUT):
            raise self._error(f"unknown block {character!r} (blocks are T, M and E)")
        self.position += 1
        return character

    def _repeat(self) -> int:
        if self._peek() != "x":
            return 1
        self.position += 1
        start = self.position
        while self._peek().isdecimal():
            self.position += 1
        count = int(self.text[start : self.position] or 0)
        if count < 1:
            raise self._error("'x' needs a number of 1 or more after it")
        return count
