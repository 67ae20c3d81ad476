"""One file of a corpus as documents: unpacked, decoded and told apart by what is in it where its name leaves doubt."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adamba.errors import DataError

if TYPE_CHECKING:
    import zstandard

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".jl")
JSON_SUFFIXES = (".json", ".ipynb")
HEAD = 1 << 20
"""bytes by which a file's kind is told"""
NAMES_KEPT = 100
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as the next one does
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)

Documents = Iterator[tuple[str, str]]
Content = io.BufferedReader | gzip.GzipFile | lzma.LZMAFile | bz2.BZ2File


class LeftOut(Counter[str]):
    """How much was left out, by reason, and in `names` what: the first of each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self[reason] += 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMES_KEPT:
            # a file's name need not be text that can be printed
            kept.append(name.encode("utf-8", errors="backslashreplace").decode("utf-8"))

    def merge(self, other: LeftOut) -> None:
        """Adds what another one counted."""
        for reason, count in other.items():
            self[reason] += count
            kept = self.names.setdefault(reason, [])
            kept += other.names[reason][: NAMES_KEPT - len(kept)]

    def described(self, most: int = 3) -> str:
        """`2 binary (a.png, b.png), 1 empty (c.txt)`, names cut after so many."""
        parts = []
        for reason, count in sorted(self.items()):
            names = self.names.get(reason, [])[:most]
            more = ", ..." if count > len(names) else ""
            parts.append(f"{count} {reason} ({', '.join(names)}{more})" if names else f"{count} {reason}")
        return ", ".join(parts)


def read_documents(name: str, path: Path, key: str, left_out: LeftOut) -> Documents:
    """(id, text) of each document of a file, empty ones too.

    The id is the name, with `:LINE` for JSON lines and `:NUMBER`, from 1 on, for the records of a JSON value. Files
    compressed by gzip, xz, zstd and bzip2 are unpacked; a byte order mark says the encoding, else it is UTF-8.

    Raises DataError: it cannot be read or unpacked, or a line of JSON is bad.
    """
    try:
        with open_content(path) as stream:
            kind = _kind(name, stream, key)
        if kind == "lines":
            yield from _json_lines(name, path, key)
            return
        text = _whole_text(name, path, left_out)
        if text is not None:
            yield from [(name, text)] if kind == "text" else _json_value(name, path, text, key, left_out, kind)
    except DAMAGED as error:
        raise DataError(f"--input {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def open_content(path: Path) -> Content:
    """A stream of what is in a file, unpacked where its first bytes say that it is compressed. Raises OSError."""
    with open(path, "rb") as stream:
        start = stream.read(10)
    if start.startswith(b"\x1f\x8b\x08"):
        return gzip.open(path)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return bz2.open(path)
    # the second one is a frame that is to be skipped, with which parallel compressors begin
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] < 0x60):
        return io.BufferedReader(_Zstd(path))
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, end to end. The library's own reader takes a file that was cut off for a whole one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._failure = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._stream = open(path, "rb")  # noqa: SIM115 (closed with this one)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._advance():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _advance(self) -> bool:
        """Unpacks one more piece; false at the end. Raises OSError."""
        self._packed = self._packed or self._stream.read(1 << 17)
        if not self._packed:
            if self._frame is not None:
                raise OSError("zstd: it ends in the middle of a frame")
            return False
        frame = self._frame or self._unpacker.decompressobj()
        try:
            self._ready = frame.decompress(self._packed)
        except self._failure as error:
            raise OSError(f"zstd: {error}") from None
        self._packed = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
        return True


def plain_suffix(name: str) -> str:
    """The last ending of a name in small letters, one of a compression aside."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def _kind(name: str, stream: Content, key: str) -> str:
    """lines | json | text | json or text, by a file's ending where that leaves no doubt, else by what is in it."""
    suffix, head = plain_suffix(name), stream.read(HEAD)
    encoding, mark = _encoding(head)
    text = head[mark:].decode(encoding, errors="replace").lstrip()
    if suffix in JSON_LINES_SUFFIXES:
        return "json" if text.startswith("[") else "lines"
    lines = [line for line in text.split("\n") if line.strip()]
    if len(head) == HEAD and lines:
        cut = lines.pop()  # off somewhere
        if not lines and suffix not in JSON_SUFFIXES and cut.startswith("{"):
            lines = [cut + stream.readline().decode(encoding, errors="ignore")]
    records = [_parsed(line) for line in lines[:2]]
    if suffix in JSON_SUFFIXES:
        return "lines" if len(lines) > 1 and isinstance(records[0], dict) else "json"
    # two objects in a row are no prose, whatever their keys
    if len(records) > 1 and all(isinstance(found, dict) for found in records):
        return "lines"
    if lines and _opens_lines(lines, key, suffix):
        return "lines"
    may_be_records = re.match(r"(\[\s*)?\{", text) and json.dumps(key) in text
    return "json or text" if may_be_records else "text"


def _opens_lines(lines: list[str], key: str, suffix: str) -> bool:
    """Whether the first line is a record with the key, whatever comes of the next ones; prose may quote one, too."""
    first = lines[0].strip()
    try:
        record, end = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):
        # cut off, unless it goes on in a next line
        quoted = json.dumps(key)
        opened = re.match(rf'\{{\s*{re.escape(quoted)}\s*:\s*"', first) or (len(first) >= HEAD // 4 and quoted in first)
        return len(lines) == 1 and first.startswith("{") and bool(opened)
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        return False
    behind = first[end:].lstrip()
    if behind:
        return behind.startswith(("{", ","))
    return len(lines) == 1 or suffix == "" or lines[1].lstrip().startswith("{")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _encoding(head: bytes) -> tuple[str, int]:
    """Encoding, and the bytes of its mark."""
    return next(((name, len(mark)) for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), ("utf-8", 0))


def _short(encoding: str) -> str:
    return encoding.removesuffix("-le").removesuffix("-be")


def _whole_text(name: str, path: Path, left_out: LeftOut) -> str | None:
    """The file as one text; None, and counted, where it is none."""
    with open_content(path) as stream:
        content = stream.read()
    encoding, mark = _encoding(content)
    if encoding == "utf-8" and b"\0" in content:
        left_out.add("binary", name)
        return None
    try:
        text = content[mark:].decode(encoding)
    except UnicodeDecodeError:
        left_out.add(f"not {_short(encoding)}", name)
        return None
    if "\0" in text:
        left_out.add("binary", name)
        return None
    return text


def _json_lines(name: str, path: Path, key: str) -> Documents:
    with open_content(path) as stream:
        encoding, mark = _encoding(stream.read(4))
    with open_content(path) as stream:
        stream.read(mark)
        lines = stream if encoding == "utf-8" else _recoded(stream, encoding, path)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{name}:{number}", _text_of(_record(path, number, line, key), f"{path} line {number}", key)


def _recoded(stream: Content, encoding: str, path: Path) -> Iterator[bytes]:
    try:
        for line in io.TextIOWrapper(stream, encoding, newline="\n"):
            yield line.encode("utf-8", errors="replace")
    except UnicodeDecodeError:
        raise DataError(f"--input {path}: begins as {_short(encoding)} and is not; convert it to UTF-8") from None


def _record(path: Path, number: int, line: bytes, key: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        what = "more than one JSON value" if getattr(error, "msg", "") == "Extra data" else "not JSON"
        raise DataError(f'{path} line {number}: {what}; a line reads {{"{key}": "..."}}') from None


def _text_of(record: Any, where: str, key: str) -> str:
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(record))[:200] if isinstance(record, dict) else "not an object"
        raise DataError(f"{where}: no text under --json-key {key} (it has: {keys})")
    return _clean(text)


def _clean(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _json_value(name: str, path: Path, text: str, key: str, left_out: LeftOut, kind: str) -> Documents:
    """One JSON value: a record, a list of them alone or under some key, or texts in a column."""
    value = _parsed(text)
    records = _records(value, key)
    if isinstance(records, str):
        yield name, _clean(records)
    elif records is not None:
        for number, record in enumerate(records, start=1):
            found = record if isinstance(record, str) else _text_of(record, f"{path} record {number}", key)
            yield f"{name}:{number}", _clean(found)
    elif kind == "json or text":
        yield name, text
    elif isinstance(_parsed(text.strip().split("\n")[0]), dict) and value is None:
        yield from _json_lines(name, path, key)
    else:
        left_out.add("empty" if not text.strip() else "not json" if value is None else f"json without {key}", name)


def _records(value: Any, key: str) -> list[Any] | str | None:
    """The records in a JSON value, the text of the one that it is, or None where there are none."""
    holds = lambda record: isinstance(record, dict) and isinstance(record.get(key), str)
    if isinstance(value, list):
        return value if any(map(holds, value)) else None
    if not isinstance(value, dict):
        return None
    column = value.get(key)
    column = list(column.values()) if isinstance(column, dict) else column
    if isinstance(column, str) or (isinstance(column, list) and column and all(isinstance(one, str) for one in column)):
        return column
    lists = [found for found in value.values() if isinstance(found, list) and any(map(holds, found))]
    return lists[0] if len(lists) == 1 else None
