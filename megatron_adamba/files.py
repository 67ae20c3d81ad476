"""Files written aside, synced and renamed: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
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
    """Puts `content` under `path`; after a failure the path holds what it held before. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(path)
    try:
        with open(aside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


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
        return StorageError(
            f"{what}: {error.strerror}; free some space or choose another folder (nothing was replaced)"
        )
    return None


def as_user_error(error: OSError, what: str) -> StorageError | None:
    """The user's error for a disk that takes no more and for a path that is not what it has to be; None for failures
    that name no path, such as those of connections."""
    if (full := as_storage_error(error, what)) or not error.filename:
        return full
    return StorageError(f"{error.filename}: {error.strerror or type(error).__name__}; put that right and start again")
