"""Documents as text, from files, JSON lines, or the interpreter's own standard library."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_adamba.data.corpus_files import COMPRESSED_SUFFIXES, LeftOut, read_documents
from megatron_adamba.data.indexed_dataset import DATASET_SUFFIXES, MAGIC
from megatron_adamba.errors import DataError

PYTHON_STDLIB = "python-stdlib"

TOKENIZER_SUFFIXES = (".model", ".tiktoken")
STDLIB_SUFFIXES = (".py", ".pyw", ".txt", ".rst", ".md")
STDLIB_EXCLUDED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# Written when an interpreter is built: they hold the paths and compilers of one machine.
STDLIB_BUILD_PREFIXES = ("config-", "_sysconfigdata")


Read = Callable[[int], None]
"""called with the bytes of files that were read since the last call"""


def iterate_documents(
    spec: str, json_key: str = "text", left_out: LeftOut | None = None, read: Read = lambda num_bytes: None
) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of every non-empty document, in an order that does not depend on the machine.

    Args:
        spec: a folder (every file of text or JSON below it, compressed or not), such a file, or `python-stdlib`.
        json_key: the key of the text in JSON.
        left_out: counts and names what holds no document: what is binary, of another encoding or hidden, folders that
            are links or cannot be read, datasets and tokenizers, JSON without the key.
        read: told how far the files are read; `corpus_bytes` is the total.

    An id is the path below the folder with forward slashes, see `read_documents` for what follows it. Lone surrogates,
    which have no UTF-8, become question marks.

    Raises:
        DataError: nothing is there, a line of JSON is bad, or there is not one document.
    """
    left_out = LeftOut() if left_out is None else left_out
    here, count = LeftOut(), 0
    for name, path in _files(spec, here):
        for identity, text in _counted(read_documents(name, path, json_key, here), path, read):
            if text:
                count += 1
                yield identity, text
            else:
                here.add("empty", identity)
    left_out.merge(here)
    if count == 0:
        why = here.described() or "no files"
        raise DataError(f"--input {spec}: there is no document in it ({why}); {PYTHON_STDLIB} always works")


def corpus_bytes(specs: Iterable[str]) -> int:
    """Bytes of the files that `iterate_documents` reads. Raises DataError as it does."""
    return sum(_size(path) for spec in specs for _, path in _files(spec, LeftOut()))


def _counted(documents: Iterator[tuple[str, str]], path: Path, read: Read) -> Iterator[tuple[str, str]]:
    """The documents of a file, each of which is read when the next one is asked for."""
    left = _size(path)
    # a compressed file says nothing of how far it is; the rest, such as JSON's marks, is counted at the end
    inside = 0 if path.suffix.lower() in COMPRESSED_SUFFIXES else left
    for identity, text in documents:
        yield identity, text
        part = min(inside, len(text))
        inside, left = inside - part, left - part
        read(part)
    read(left)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # whoever reads it says what is wrong


def _files(spec: str, left_out: LeftOut) -> list[tuple[str, Path]]:
    if spec == PYTHON_STDLIB:
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    path = Path(spec)
    if spec and os.path.isdir(path):
        return _folder_files(path, left_out)
    if os.path.isfile(path):
        return [(path.name, path)]
    what = "is neither a file nor a folder" if os.path.lexists(path) else "no such file or folder"
    raise DataError(f"--input {spec}: {what}; {PYTHON_STDLIB} always works")


def _folder_files(root: Path, left_out: LeftOut) -> list[tuple[str, Path]]:
    """(path below root, path) of the files that may hold documents, sorted; the rest is counted."""

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"--input {root}: cannot be read ({error.strerror})") from None
        left_out.add("unreadable", below(Path(error.filename)) + "/")

    def below(path: Path) -> str:
        return path.relative_to(root).as_posix()

    found = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        entered = []
        for name in sorted(folders):
            why = "hidden" if name.startswith(".") else "linked folder" if os.path.islink(here / name) else None
            entered += [name] if why is None else []
            if why is not None:
                left_out.add(why, below(here / name) + "/")
        folders[:] = entered
        ours = _dataset_files(here, files)
        # what this very process is writing is nobody's to miss
        for name in sorted(name for name in files if not name.endswith(f".tmp-{os.getpid()}")):
            path = here / name
            why = "dataset" if name in ours else _why_not(path)
            if why is None:
                found.append((below(path), path))
            else:
                left_out.add(why, below(path))
    return sorted(found)


def _why_not(path: Path) -> str | None:
    """Why a file of a folder is not looked into."""
    if path.name.startswith("."):
        return "hidden"
    if not os.path.isfile(path):
        return "broken link" if os.path.islink(path) and not os.path.exists(path) else "no regular file"
    if re.search(r"\.tmp-\d+$", path.name):
        return "temporary"
    if path.suffix in TOKENIZER_SUFFIXES:
        return "tokenizer"
    return None if os.access(path, os.R_OK) else "unreadable"


def _dataset_files(folder: Path, files: list[str]) -> set[str]:
    """Names of the files of indexed datasets, told by the first bytes of their indexes."""
    held = set()
    for name in files:
        if name.endswith(".idx") and os.path.isfile(folder / name) and os.access(folder / name, os.R_OK):
            with open(folder / name, "rb") as stream:
                if stream.read(len(MAGIC)) == MAGIC:
                    held |= {name.removesuffix(".idx") + suffix for suffix in DATASET_SUFFIXES}
    return held


def _stdlib_files(root: Path) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _in_stdlib_corpus(name + "/")]
        found += [Path(folder, name) for name in files if _in_stdlib_corpus(name)]
    return sorted((path.relative_to(root).as_posix(), path) for path in found if path.is_file())


def _in_stdlib_corpus(name: str) -> bool:
    """Whether a folder (its name ends in a slash) is entered, or a file is taken."""
    if name.startswith(STDLIB_BUILD_PREFIXES):
        return False
    return name.rstrip("/") not in STDLIB_EXCLUDED if name.endswith("/") else name.endswith(STDLIB_SUFFIXES)
