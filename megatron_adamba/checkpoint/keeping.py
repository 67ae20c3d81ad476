"""The step folders of a run: which are complete, which may go, and what is set aside instead.

RUN/checkpoints/step-00000200            a checkpoint
RUN/checkpoints/step-00000200.tmp        one on its way
RUN/checkpoints/set-aside/step-00000200  one that the run went back behind; nobody deletes it
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_adamba.files import remove, sync_directory

STATE_FILE, FILES_FILE, LATEST = "state.json", "files.json", "latest"
SET_ASIDE = "set-aside"
_NAME, _ON_ITS_WAY = re.compile(r"step-(\d{8,})"), re.compile(r"step-\d{8,}\.tmp")
_REPLACED = ".replaced.tmp"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None for a name that no run gives."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def step_folders(root: Path) -> list[Path]:
    """Checkpoints by name, complete or not, oldest first."""
    return [path for _, path in _by_step(root)]


def _by_step(root: Path) -> list[tuple[int, Path]]:
    found = ((step_of(path), path) for path in root.glob("step-*") if path.is_dir())
    return sorted(((step, path) for step, path in found if step is not None), key=lambda pair: pair[0])


def complete_folders(root: Path) -> list[Path]:
    """Those to which the last file was written, oldest first; what is in them is not looked at."""
    return [path for path in step_folders(root) if _is_complete(path)]


def _is_complete(folder: Path) -> bool:
    return (folder / FILES_FILE).is_file()


def run_id_of(folder: Path) -> str | None:
    """Which run wrote a checkpoint, as far as its own files say so in a form that can be read."""
    for name, keys in ((STATE_FILE, ("config", "run_id")), ("config.json", ("run_id",))):
        try:
            value = json.loads((folder / name).read_text())
            for key in keys:
                value = value[key]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            continue
        if isinstance(value, str):
            return value
    return None


def bring_back(root: Path) -> None:
    """Give checkpoints their names again that a process was killed over, between the two renames that replace one."""
    for replaced in root.glob(f"step-*{_REPLACED}"):
        final = root / replaced.name.removesuffix(_REPLACED)
        if step_of(final) is not None and not os.path.lexists(final):
            replaced.rename(final)


def make_room(root: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; what a killed process left of one on its way is taken away."""
    root.mkdir(parents=True, exist_ok=True)
    bring_back(root)
    for stale in root.glob("step-*.tmp"):
        if _ON_ITS_WAY.fullmatch(stale.name):
            remove(stale)
    aside = root / f"{checkpoint_name(step)}.tmp"
    aside.mkdir()
    return aside


def put_in_place(aside: Path, final: Path, run_id: str | None) -> None:
    """Rename; a folder of that name that another run wrote is set aside, an own one goes when the new one is in."""
    replaced = None
    if os.path.lexists(final):
        if run_id is not None and run_id_of(final) == run_id:
            replaced = final.rename(final.with_name(final.name + _REPLACED))
        else:
            set_aside([final])
    aside.rename(final)
    sync_directory(final.parent)
    if replaced is not None:
        remove(replaced)


def prune(root: Path, newest: Path, keep_last: int, run_id: str | None) -> None:
    """Take away checkpoints beyond the last `keep_last` up to `newest`, those alone that this run wrote itself."""
    last = step_of(newest)
    if run_id is None or last is None:
        return
    complete = [path for step, path in _by_step(root) if step <= last and _is_complete(path)]
    own = [path for path in complete if run_id_of(path) == run_id]
    for old in own[:-keep_last]:
        remove(old)


def complete_before(root: Path, step: int) -> list[Path]:
    """Complete checkpoints of earlier steps, oldest first."""
    return [path for at, path in _by_step(root) if at < step and _is_complete(path)]


def later_than(root: Path, step: int) -> list[Path]:
    """Checkpoints of later steps, whole or not: those of a branch that a run at `step` went back from."""
    return [path for at, path in _by_step(root) if at > step]


def set_aside(paths: Iterable[Path]) -> list[Path]:
    """Move folders or files into `set-aside` beside them, under a name that is free; returns where they are now."""
    moved = []
    for path in paths:
        folder = path.parent / SET_ASIDE
        folder.mkdir(exist_ok=True)
        names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
        target = next(folder / name for name in names if not os.path.lexists(folder / name))
        moved.append(path.rename(target))
        sync_directory(folder)
    return moved
