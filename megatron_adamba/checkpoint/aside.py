"""Folders written aside and renamed: a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_adamba.files import as_storage_error, remove, sync_directory


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it takes the name `folder`, in place of what had it before.

    The files in it are the block's to sync. After a failure `folder` is what it was. Raises StorageError where the
    disk is full or refuses to be written to.
    """
    aside, old = _beside(folder, ".tmp"), _beside(folder, ".replaced.tmp")
    try:
        clear_leftovers(folder)
        aside.mkdir(parents=True)
        yield aside
        sync_directory(aside)
        remove(old)
        if os.path.lexists(folder):
            folder.rename(old)
        aside.rename(folder)
        sync_directory(folder.parent)
        remove(old)
    except BaseException as error:
        remove(aside)
        if not isinstance(error, OSError):
            raise
        raise as_storage_error(error, str(folder)) or error from None


def clear_leftovers(folder: Path) -> None:
    """Take away what a process left that was killed while it wrote `folder`."""
    remove(_beside(folder, ".tmp"))


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(folder.name + end)
