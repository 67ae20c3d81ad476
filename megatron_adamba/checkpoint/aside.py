"""Folders written aside and renamed: a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_adamba.files import as_storage_error, sync_directory


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
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_directory(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise as_storage_error(error, str(folder)) or error from None


def clear_leftovers(folder: Path) -> None:
    """Take away what a process left that was killed while it wrote `folder`."""
    shutil.rmtree(_beside(folder, ".tmp"), ignore_errors=True)


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(folder.name + end)
