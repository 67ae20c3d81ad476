"""Splitting patterns of tiktoken in the dialect of the tokenizers library.

tiktoken reads Rust's (docs.rs/fancy-regex), the library Oniguruma's with the syntax of Ruby (its doc/RE): there "$"
ends a line, "{1,3}+" repeats a repetition, "(?m)" is Rust's "(?s)", and an option in the middle of a branch takes the
later branches into a group. What has no counterpart is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_OPTIONS = re.compile(r"\?([a-zA-Z]*)(?:-([a-zA-Z]+))?([:)])")
_NAMED = re.compile(r"\?P?<(\w+)>")
_NAMED_AGAIN = re.compile(r"\?P=(\w+)\)")
_POSIX = re.compile(r"\[:(\^?)(\w+):\]")
_PROPERTY = re.compile(r"\{(\^?)(?:(?:gc|General_Category|sc|Script)[=:])?([\w &-]+)\}|([A-Z])")
_CODE = {"x": re.compile(r"\{([0-9a-fA-F]+)\}|([0-9a-fA-F]{2})"), "u": re.compile(r"\{([0-9a-fA-F]+)\}|(\w{4})")}
_CODE["U"] = re.compile(r"\{([0-9a-fA-F]+)\}|([0-9a-fA-F]{8})")
_PLAIN_GROUPS = ("?:", "?=", "?!", "?>", "?<=", "?<!")
_LETTERS = "dDwWsSnrtfvaehHbBAz"
"""escapes that mean the same"""
_EDGES = {"<": r"\b(?=\w)", ">": r"\b(?<=\w)"}
_ASCII = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7F",
    "blank": r"\t\x20",
    "cntrl": r"\x00-\x1F\x7F",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": r"\x20-~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t-\r\x20",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
"""Rust's classes of these names, which are Unicode's in the other dialect"""


def for_tokenizers(pattern: str) -> str:
    """Raises ValueError naming what has no counterpart."""
    return _Translation(pattern).whole()


@dataclass
class _Group:
    opening: str = ""
    lines: bool = False
    """whether ^ and $ are those of lines"""
    spaced: bool = False
    """whether spaces and comments outside classes do not count"""
    parts: list[str] = field(default_factory=list)
    repeated: bool = False
    """whether the last part has a quantifier"""
    options: list[str] = field(default_factory=list)
    """groups of options opened in the middle, for the rest of each branch"""

    def add(self, part: str, repeated: bool = False) -> None:
        self.parts.append(part)
        self.repeated = repeated

    def content(self) -> str:
        return self.opening + "".join(self.parts) + ")" * len(self.options)


class _Translation:
    def __init__(self, pattern: str) -> None:
        self._text, self._place = pattern, 0
        self._groups = [_Group()]

    def whole(self) -> str:
        while self._place < len(self._text):
            self._step()
        if len(self._groups) > 1:
            raise ValueError("a group that is not closed")
        return self._groups[0].content()

    def _next(self) -> str:
        if self._place == len(self._text):
            raise ValueError("its end in the middle of something")
        self._place += 1
        return self._text[self._place - 1]

    def _take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self._text, self._place)
        self._place = found.end() if found else self._place
        return found

    def _takes(self, text: str) -> bool:
        found = self._text.startswith(text, self._place)
        self._place += len(text) * found
        return found

    def _step(self) -> None:
        group, char = self._groups[-1], self._next()
        if group.spaced and (char.isspace() or char == "#"):
            end = self._text.find("\n", self._place) if char == "#" else self._place
            self._place = len(self._text) if end < 0 else end
        elif char == "(":
            self._open(group)
        elif char == ")":
            self._close()
        elif char == "|":
            group.add(")" * len(group.options) + "|" + "".join(group.options))
        elif char in "*+?":
            self._repeat(group, char, False)
        elif char == "{" and (count := _COUNT.match(self._text, self._place - 1)) and count[0] not in ("{}", "{,}"):
            self._place = count.end()
            self._repeat(group, f"{{{count[1] or 0}{count[2]}{count[3]}}}", True)
        else:
            group.add(self._single(group, char))

    def _single(self, group: _Group, char: str) -> str:
        if char == "\\":
            return self._escape()
        if char == "[":
            return self._class()
        if char == "^":
            return r"(?:\A|(?<=\n))" if group.lines else r"\A"
        if char == "$":
            return r"(?=\n|\z)" if group.lines else r"\z"
        return "\\" + char if char in "{}]" else char

    def _repeat(self, group: _Group, count: str, counted: bool) -> None:
        if not group.parts:
            raise ValueError("a repetition of nothing")
        part = f"(?:{group.parts.pop()})" if group.repeated else group.parts.pop()
        if self._takes("?"):
            # exactly so many have no shorter way, and in the other dialect become a choice
            group.add(part + count + "?" * (not counted or "," in count), True)
        elif self._takes("+"):
            group.add(f"(?>{part}{count})" if counted else f"{part}{count}+", not counted)
        else:
            group.add(part + count, True)

    def _open(self, group: _Group) -> None:
        inner = _Group("(", group.lines, group.spaced)
        if named := self._take(_NAMED_AGAIN):
            group.add(rf"\k<{named[1]}>")
            return
        if self._takes("?#"):
            while self._next() != ")":
                pass
            return
        plain = next((kind for kind in _PLAIN_GROUPS if self._takes(kind)), None)
        if plain is not None:
            inner.opening += plain
        elif named := self._take(_NAMED):
            inner.opening += f"?<{named[1]}>"
        elif options := self._take(_OPTIONS):
            opening = self._options(group if options[3] == ")" else inner, options[1], options[2] or "")
            if options[3] == ")":
                group.options.append(opening)
                group.add(opening)
                return
            inner.opening = opening
        elif self._takes("?"):
            raise ValueError(f"(?{self._text[self._place :][:1]}")
        self._groups.append(inner)

    def _options(self, group: _Group, on: str, off: str) -> str:
        """The opening of a group with these options; those that stay here are set."""
        unknown = next((letter for letter in on + off if letter not in "imsxu"), "u" if "u" in off else None)
        if unknown:
            raise ValueError(f"option {unknown}")
        group.lines = "m" in on or (group.lines and "m" not in off)
        group.spaced = "x" in on or (group.spaced and "x" not in off)
        theirs = {"i": "i", "s": "m"}
        on, off = ("".join(theirs[letter] for letter in dict.fromkeys(part) if letter in theirs) for part in (on, off))
        return f"(?{on}{'-' * bool(off)}{off}:"

    def _close(self) -> None:
        if len(self._groups) == 1:
            raise ValueError("a ) too many")
        closed = self._groups.pop()
        self._groups[-1].add(closed.content() + ")")

    def _escape(self, in_class: bool = False) -> str:
        char = self._next()
        if char in "pP" and (found := self._take(_PROPERTY)):
            return rf"\{char}{{{found[1] or ''}{found[2] or found[3]}}}"
        if char in _CODE and (found := self._take(_CODE[char])):
            return rf"\x{{{found[1] or found[2]}}}"
        if not in_class and char in _EDGES:
            return _EDGES[char]
        if not in_class and char in "123456789":
            return "\\" + char
        if char == "k" and (found := self._take(re.compile(r"<\w+>"))):
            return r"\k" + found[0]
        if (char.isalnum() and char not in _LETTERS) or (char in "bB" and (in_class or self._takes("{"))):
            raise ValueError(f"\\{char}")
        return "\\" + char

    def _class(self) -> str:
        """From behind its [ on."""
        made, pending = "[" + "^" * self._takes("^"), ""
        made += r"\]" * self._takes("]")
        while not self._takes("]"):
            if self._takes("--"):
                # all but: in both dialects && leaves what is in both
                made, pending = made + pending + "&&[^", "]"
            elif self._takes("&&"):
                made, pending = made + pending + "&&", ""
            elif self._takes("~~"):
                raise ValueError("~~")
            elif (named := self._take(_POSIX)) and named[2] in _ASCII:
                made += f"[{named[1]}{_ASCII[named[2]]}]"
            else:
                char = self._next()
                if char == "[":
                    made += self._class()
                else:
                    made += self._escape(in_class=True) if char == "\\" else char
        return made + pending + "]"
