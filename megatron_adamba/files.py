"""Files written aside, synced and renamed: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import errno
import os
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


def as_storage_error(error: OSError, what: str) -> StorageError | None:
    """The user's error for a disk that takes no more, None for any other failure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(
            f"{what}: {error.strerror}; free some space or choose another folder (nothing was replaced)"
        )
    return None
