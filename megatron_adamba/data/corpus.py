"""Documents as text, from files, JSON lines, or the interpreter's own standard library."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_adamba.errors import DataError

PYTHON_STDLIB = "python-stdlib"

STDLIB_SUFFIXES = (".py", ".pyw", ".txt", ".rst", ".md")
STDLIB_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# Written when an interpreter is built: they hold the paths and compilers of one machine.
STDLIB_BUILD_PREFIXES = ("config-", "_sysconfigdata")


def iterate_documents(
    spec: str, json_key: str = "text", skipped: Counter[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of every non-empty document, in an order that does not depend on the machine.

    Args:
        spec: a folder (every UTF-8 text file below it, dot files left out, `.jsonl` read as such); a `.jsonl` file,
            a document a line; any other file, one document; or `python-stdlib`.
        json_key: the key of the text in JSON lines.
        skipped: counts of what was left out, under `binary`, `not utf-8` and `empty`.

    An id is the path below the folder with forward slashes, and `:LINE` for JSON lines. Lone surrogates, which have
    no UTF-8, become question marks.

    Raises:
        DataError: nothing is there, a line of JSON is bad, or there is not one document.
    """
    skipped = Counter() if skipped is None else skipped
    count = 0
    for name, path in _files(spec):
        documents = _json_lines(name, path, json_key) if path.suffix == ".jsonl" else _text_file(name, path, skipped)
        for identity, text in documents:
            if not text:
                skipped["empty"] += 1
                continue
            count += 1
            yield identity, text
    if count == 0:
        left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items())) or "no files"
        raise DataError(f"--input {spec}: there is no document in it ({left_out}); {PYTHON_STDLIB} always works")


def is_validation(identity: str, validation_fraction: float) -> bool:
    """Whether the document of this id is held out: a pure function of the id, near `validation_fraction` of all."""
    draw = int.from_bytes(
        hashlib.blake2b(identity.encode("utf-8", errors="surrogateescape"), digest_size=8).digest(), "big"
    )
    return draw < validation_fraction * 2.0**64


def _files(spec: str) -> list[tuple[str, Path]]:
    if spec == PYTHON_STDLIB:
        return _walk(Path(sysconfig.get_path("stdlib")), _in_stdlib_corpus)
    path = Path(spec)
    if path.is_dir():
        return _walk(path, lambda name: not name.startswith("."))
    if path.is_file():
        return [(path.name, path)]
    raise DataError(f"--input {spec}: no such file or folder; {PYTHON_STDLIB} always works")


def _walk(root: Path, wanted) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if wanted(name + "/")]
        found += [Path(folder, name) for name in files if wanted(name)]
    named = [(path.relative_to(root).as_posix(), path) for path in found if path.is_file()]
    return sorted(named)


def _in_stdlib_corpus(name: str) -> bool:
    """Whether a folder (its name ends in a slash) is entered, or a file is taken."""
    if name.startswith(STDLIB_BUILD_PREFIXES):
        return False
    return name.rstrip("/") not in STDLIB_EXCLUDED if name.endswith("/") else name.endswith(STDLIB_SUFFIXES)


def _text_file(name: str, path: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    content = _read(path)
    if b"\0" in content:
        skipped["binary"] += 1
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        skipped["not utf-8"] += 1
        return
    yield name, text


def _json_lines(name: str, path: Path, key: str) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{name}:{number}", _json_text(path, number, line, key)
    except OSError as error:
        raise DataError(f"--input {path}: cannot be read ({error.strerror})") from None


def _json_text(path: Path, number: int, line: bytes, key: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:  # also what is not UTF-8
        raise DataError(f'{path} line {number}: not JSON; a line reads {{"{key}": "..."}}') from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else "not an object"
        raise DataError(f"{path} line {number}: no text under --json-key {key} (it has: {keys})")
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"--input {path}: cannot be read ({error.strerror})") from None
