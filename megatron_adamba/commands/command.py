"""What a command is: an entry of `adamba`, with options of its own, or with commands below it."""

from __future__ import annotations

import importlib
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import nearest
from megatron_adamba.config.script import as_settings
from megatron_adamba.errors import ConfigError

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Command:
    """Options that the shared parser reads, and what runs with them."""

    summary: str
    """one line, as lists of commands show it"""
    add_options: Callable[[CommandParser], None]
    run: Callable[[Namespace], int]
    """returns the exit code; raises AdambaError"""
    details: str = ""
    examples: tuple[str, ...] = ()
    reworded: Callable[[str], str] = as_settings
    """what messages go through, so that they name no flag that the command has not"""
    leave: Callable[[int], NoReturn] = sys.exit

    def parser(self, prog: str) -> CommandParser:
        text = f"{self.summary[:1].upper()}{self.summary[1:]}."
        description = f"{text}\n\n{self.details.strip()}" if self.details else text
        parser = CommandParser(prog=prog, description=description, examples=self.examples)
        self.add_options(parser)
        return parser

    def main(self, words: Sequence[str], prog: str) -> int:
        return self.run(self.parser(prog).read(words))


@dataclass(frozen=True)
class Program:
    """A command with a command line of its own."""

    summary: str
    start: Callable[[Sequence[str], str], int]
    """takes the words and the name that help shows"""
    reworded: Callable[[str], str] = as_settings
    leave: Callable[[int], NoReturn] = sys.exit
    """how the process ends"""

    def main(self, words: Sequence[str], prog: str) -> int:
        return self.start(words, prog)


@dataclass(frozen=True)
class Group:
    """Commands below a command: `adamba surgery graft`."""

    summary: str
    members: Mapping[str, Command | Program | Group | str]
    """by name; a string is a module that holds the entry as COMMAND and is imported when it is needed"""
    details: str = ""
    examples: tuple[str, ...] = ()
    reworded: Callable[[str], str] = as_settings
    leave: Callable[[int], NoReturn] = sys.exit

    def member(self, name: str) -> Command | Program | Group:
        found = self.members[name]
        return importlib.import_module(found).COMMAND if isinstance(found, str) else found

    def help(self, prog: str) -> str:
        width = max(map(len, self.members)) + 2
        lines = [f"usage: {prog} COMMAND ...", "", f"{self.summary[:1].upper()}{self.summary[1:]}."]
        lines += ["", self.details.strip()] if self.details else []
        lines += ["", "commands:"]
        for name in self.members:
            first, *rest = textwrap.wrap(self.member(name).summary, 78 - width)
            lines += [f"  {name:{width}}{first}", *(" " * (width + 2) + line for line in rest)]
        lines += ["", "examples:", *(f"  {line}" for line in self.examples)] if self.examples else []
        return "\n".join([*lines, "", f"{prog} COMMAND --help shows the options of a command."])

    def main(self, words: Sequence[str], prog: str) -> int:
        """Shows the help: what a command line that names none of the members asks for."""
        if words and words[0] not in HELP:
            raise ConfigError(self._unknown(words[0], prog))
        print(self.help(prog), file=sys.stdout if words else sys.stderr)
        return 0 if words else ConfigError.exit_code

    def _unknown(self, name: str, prog: str) -> str:
        near = nearest(name, list(self.members))
        advice = f"did you mean {prog} {near}?" if near else f"one of {', '.join(self.members)}"
        return f"{prog} {name}: is no command; {advice}"


def find(group: Group, words: Sequence[str], prog: str) -> tuple[Command | Program | Group, str, list[str]]:
    """The entry that the first words name, what its help calls it, and the words behind."""
    entry: Command | Program | Group = group
    rest = list(words)
    while isinstance(entry, Group) and rest and rest[0] in entry.members:
        prog = f"{prog} {rest[0]}"
        entry = entry.member(rest.pop(0))
    return entry, prog, rest
