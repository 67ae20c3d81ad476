"""The one option parser of all commands: their help alike, and a wrong word told in one line with the nearest right
one."""

from __future__ import annotations

import argparse
import math
import re
from argparse import ArgumentError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from megatron_adamba.config.rules import nearest
from megatron_adamba.errors import ConfigError


def number(word: str | float) -> float:
    """For options of which infinity is a value too; what `float` reads has no word for it."""
    value = float(str(word).replace(".inf", "inf"))  # as YAML has it; the library asks again with what came of it
    if math.isnan(value):
        raise ValueError(word)
    return value


_METAVARS = {int: "N", float: "X", number: "X", Path: "PATH"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults behind the texts; descriptions and examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return text
        if isinstance(default, bool):
            default = "true"
        if isinstance(default, list):
            default = ",".join(map(str, default))
        return f"{text} [{str(default).replace('%', '%%')}]".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action, "_typehint", action.type)  # where the library keeps what `type` was
        return _METAVARS.get(kind) or action.dest.rpartition(".")[2].upper()


class CommandParser(ArgumentParser):
    """jsonargparse's, with whole flags alone, and every error a `ConfigError` of one line."""

    def __init__(
        self, *, prog: str | None = None, description: str | None = None, examples: Sequence[str] = (), **more: Any
    ) -> None:
        # the library makes parsers of the same class for nested values, and gives them neither name nor description
        more.setdefault("formatter_class", HelpFormatter)
        if examples:
            more["epilog"] = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        more = {"exit_on_error": False, "allow_abbrev": False, "print_config": None, **more}
        super().__init__(prog=prog, description=description, **more)

    def read(self, words: Sequence[str]) -> Namespace:
        """The options of a command line. Raises ConfigError; ends the process behind `--help`."""
        self._check_names(words)
        try:
            # the library's own namespaces have methods under names such as `items`
            return Namespace(**self.parse_args(list(words)).as_dict())
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{_plain(str(error))}; see {self.prog} --help") from None

    def _check_names(self, words: Sequence[str]) -> None:
        flags = {option for action in self._actions for option in action.option_strings}
        for word in words:
            if word == "--":
                return
            name = word.split("=", 1)[0]
            if name.startswith("--") and name not in flags:
                near = nearest(name, sorted(flags))
                advice = f"did you mean {near}?" if near else f"see {self.prog} --help"
                raise ConfigError(f"{name}: unknown flag; {advice}")


def _plain(text: str) -> str:
    """The libraries' messages about a value, with the flag, the value and what it must be."""
    text = " ".join(text.split())
    found = re.fullmatch(r"Parser key \"(\w+)\": Expected a <class '(\w+)'>\. Got value: (.*)", text)
    found = found or re.fullmatch(r"argument --([\w-]+): invalid (\w+) value: '(.*)'", text)
    if found is None:
        return text.removeprefix("argument ")
    kind = {"int": "a whole number", "float": "a number", "number": "a number"}.get(found[2], found[2])
    return f"--{found[1].replace('_', '-')} {found[3]}: must be {kind}"
