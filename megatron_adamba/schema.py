"""The one way in for values that others wrote: JSON checked by type and range where it enters, against annotations.

What a file must hold is said once, as a dataclass, a TypedDict or any annotation that pydantic knows; ranges are
`Annotated[int, Field(ge=0)]`. Types are strict: true is no number, 1.5 and "1" are no integers.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from megatron_adamba.errors import AdambaError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")
JsonObject = dict[str, Any]
"""an object of which nothing more is asked here"""


def _inside(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or len(name.encode()) > 255:
        raise ValueError("leaves the folder, or is no name of a file")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""of a file beside the one that is read"""
TensorName = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=2**62)]
"""a number of things or bytes"""
Size = Annotated[int, Field(ge=1, le=2**62)]
"""a number of things, of which there is at least one"""
Finite = Annotated[float, Field(allow_inf_nan=False)]
LARGEST_FILE = 1 << 30
"""bytes of JSON that are read at all"""


def read_json(path: Path, kind: TypeForm[T], error: type[AdambaError], advice: str) -> T:
    """A JSON file as a value of `kind`.

    Raises `error`, one line that names the file, the first place in it that is wrong, and `advice`, where the file is
    missing, no regular file, too large, not UTF-8, not JSON, or not of `kind`.
    """
    return parse_json(read_regular(path, error, advice), kind, str(path), error, advice)


def read_regular(path: Path, error: type[AdambaError], advice: str, most: int = LARGEST_FILE, flag: str = "") -> bytes:
    """The bytes of a regular file: a pipe would be waited for. flag: what the message begins with. Raises `error`."""
    source = f"{flag} {path}" if flag else str(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            raise error(f"{source}: is no regular file; {advice}")
        size = path.stat().st_size
        if size > most:
            raise error(f"{source}: {size:,} bytes, at most {most:,} are read; {advice}")
        return path.read_bytes()
    except (OSError, ValueError) as failure:
        if isinstance(failure, AdambaError):
            raise
        # ValueError: a name that no file can have
        raise error(f"{source}: {getattr(failure, 'strerror', None) or failure}; {advice}") from None


def parse_json(
    content: bytes | str, kind: TypeForm[T], source: str, error: type[AdambaError], advice: str, part: str = ""
) -> T:
    """JSON text as a value of `kind`; source: what the message names; part: which part of it. Raises `error`."""
    begin = f"{source}: {part} is damaged" if part else f"{source}: damaged"
    try:
        return _adapter(cast(Hashable, kind)).validate_json(content, strict=True)
    except ValidationError as failure:
        raise error(f"{begin} ({_first(failure)}); {advice}") from None
    except (ValueError, RecursionError) as failure:
        raise error(f"{begin} ({failure}); {advice}") from None


def check_value(value: Any, kind: TypeForm[T], source: str, error: type[AdambaError], advice: str, part: str = "") -> T:
    """A value that came as Python objects (from YAML, a header, a request) as one of `kind`. Raises `error`."""
    try:
        content = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as failure:
        raise error(f"{source}: {part or 'its content'} is damaged ({failure}); {advice}") from None
    return parse_json(content, kind, source, error, advice, part)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(failure: ValidationError) -> str:
    """Where the first fault is and what it is, without the value, which may be long or secret."""
    found = failure.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    text = found["msg"][:160]
    return f"{place[:160]}: {text}" if place else text
