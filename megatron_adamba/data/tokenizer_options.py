"""What a tokenizer is chosen by beside its file: how commands name it, and the note that lies beside a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_adamba.config.root import TOKENIZER_NOTE
from megatron_adamba.errors import AdambaError, TokenizerError
from megatron_adamba.schema import read_json

MOST_IDS = 1 << 24
"""ids that a vocabulary may have: sixty times the largest one published"""
LARGEST_FILE = 1 << 28
"""bytes of a tokenizer file"""
PROBE = (
    "In 2024, (a+b)*c:\n\t\u00e9t\u00e9 \u4f60\u597d \U0001f600\r\n  'll e\u0301\u200b\x7f 1234567 $5 ^2 \ue000 \u20ac"
)
"""text of every kind of character, which each tokenizer is tried on before it is trusted"""

TokenId = Annotated[int, Field(ge=0, lt=MOST_IDS)]


@dataclass(frozen=True)
class TokenizerFlags:
    """How the command at hand calls what it was given; messages say it in these words."""

    tokenizer: str = "--tokenizer"
    eod_token: str = "--eod-token"
    split_pattern: str = "--split-pattern"


TOOL_FLAGS = TokenizerFlags()
RUN_FLAGS = TokenizerFlags("--data.tokenizer", "--data.eod_token", "--data.split_pattern")
FOLDER_FLAGS = TokenizerFlags(
    "tokenizer",
    f"`eod_token` in a FILE{TOKENIZER_NOTE} beside it",
    f"`split_pattern` in a FILE{TOKENIZER_NOTE} beside it",
)
"""of a folder that brings its own tokenizer, where no flag chooses one"""


@dataclass(frozen=True)
class TokenizerNote:
    """FILE.meta.json beside a tokenizer file: what the file itself cannot say. All of it may be left out."""

    eod_token: str | None = None
    split_pattern: str | None = None
    """of a rank file: the name of a published encoding, or a regular expression"""
    special_tokens: dict[str, TokenId] | None = None
    """of a rank file"""
    name: str | None = None

    @classmethod
    def beside(cls, path: Path) -> TokenizerNote:
        """The note of a tokenizer file, empty without one. Raises TokenizerError where it is not what it should be."""
        note = path.with_name(path.name + TOKENIZER_NOTE)
        if not note.exists():
            return cls()
        return read_json(note, cls, TokenizerError, "mend the file, or remove it")

    def content(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@contextmanager
def library_failures(message: str) -> Iterator[None]:
    """Whatever a tokenizer library raises, as TokenizerError: `message` with its reason in the place of `{reason}`.

    The Rust ones raise bare Exception, and where they panic something that is not even that.
    """
    try:
        yield
    except AdambaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(message.replace("{reason}", first_line(error)[:160])) from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_range(ids: list[int], vocab_size: int, name: str) -> None:
    """Raises TokenizerError for an id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise TokenizerError(f"token id {token} is not in {name}: ids go from 0 to {vocab_size - 1}")


def clean_text(text: str) -> str:
    """Lone surrogates, which have no UTF-8 and which the Rust libraries refuse, as question marks."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")
