"""Files written aside, synced and renamed: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
from pathlib import Path

from megatron_adamba.errors import StorageError


def temporary_path(path: Path) -> Path:
    """A name beside `path` (same folder, hence same file system, so that the rename is atomic)."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def sync_directory(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` under `path`; after a failure the path holds what it held before. Behind a symbolic link it is the
    target that is replaced. A pipe, a terminal or another character device takes the content as it is, and so does
    what this process writes its output to. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if (descriptor := _open_already(path)) is not None:
        _write_through(descriptor, content)
        return
    target = written_file(path)
    if target is None:
        with open(path, "wb", buffering=0) as stream:
            _write_through(stream.fileno(), content)
        return
    aside = temporary_path(target)
    try:
        with open(aside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def written_file(path: Path) -> Path | None:
    """The regular file that is, or is to be, at `path`, behind symbolic links; None for a pipe or a character device,
    which nothing may be put in place of. Raises OSError for what is neither, but for folders."""
    found = _kind(path)
    if stat.S_ISFIFO(found) or stat.S_ISCHR(found):
        return None
    if stat.S_ISBLK(found) or stat.S_ISSOCK(found):
        raise OSError(errno.ENXIO, "is a block device or a socket, and no file", str(path))
    # a name of its own where it is no link, so that messages call it as it was given
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _kind(path: Path) -> int:
    """Of what is there behind symbolic links, 0 for nothing. Raises OSError, for links that lead round in circles."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return 0


def _open_already(path: Path) -> int | None:
    """Standard output or error where they go to `path`, as to /dev/stdout: what is there must not be replaced, as more
    may follow."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                stream.flush()
                return descriptor
    return None


def _write_through(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def remove(path: Path) -> None:
    """Takes away a file, a link (not what it leads to) or a whole folder; nothing there is fine, and so is what cannot
    be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def as_storage_error(error: OSError, what: str) -> StorageError | None:
    """The user's error for a disk that takes no more, None for any other failure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        limit = "raise the limit of a file's size (ulimit -f), or " if error.errno == errno.EFBIG else ""
        return StorageError(
            f"{what}: {error.strerror}; {limit}free some space or choose another folder (nothing was replaced)"
        )
    return None


def as_user_error(error: OSError, what: str) -> StorageError | None:
    """The user's error for a disk that takes no more and for a path that is not what it has to be; None for failures
    that name no path, such as those of connections."""
    if (full := as_storage_error(error, what)) or not error.filename:
        return full
    return StorageError(f"{error.filename}: {error.strerror or type(error).__name__}; put that right and start again")
