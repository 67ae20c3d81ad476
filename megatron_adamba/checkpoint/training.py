"""Training checkpoints: what a run needs to go on, written by all ranks, whole or not at all.

RUN/checkpoints/step-00000200/{__0_0.distcp, ..., metadata.json, state.json, files.json}
RUN/checkpoints/latest                  name of the newest complete one
"""

from __future__ import annotations

import json
import shutil
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_adamba import errors
from megatron_adamba.checkpoint.dcp_json import METADATA_FILE, JsonReader, JsonWriter, read_metadata, tensor_entries
from megatron_adamba.checkpoint.formats import Files, StoredState
from megatron_adamba.checkpoint.keeping import (
    FILES_FILE,
    LATEST,
    STATE_FILE,
    checkpoint_name,
    complete_folders,
    make_room,
    put_in_place,
    step_folders,
)
from megatron_adamba.checkpoint.rectangles import Fragment
from megatron_adamba.checkpoint.whole_tensors import WholeTensors
from megatron_adamba.errors import AdambaError, CheckpointError
from megatron_adamba.files import as_user_error, sync_directory, write_atomically
from megatron_adamba.schema import read_json

T = TypeVar("T")
_BLOCK = 1 << 20
_EARLIER = "use an earlier checkpoint"


def save_training_checkpoint(
    root: Path,
    step: int,
    fragments: dict[str, Fragment],
    state: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    carried: Mapping[str, bytes] | None = None,
) -> Path:
    """Called by every rank with its own fragments; returns the finished folder.

    state: JSON values, the same on all ranks, the `run_id` in its config; group: of all ranks, to meet in; None is the
    world's. Checkpoints of other steps stay (`keeping.prune` takes them away). carried: the tokenizer's files, by name.
    Raises StorageError where the disk is full; what was there before is untouched.
    """
    rank = dist.get_rank()
    final = root / checkpoint_name(step)
    aside = root / f"{checkpoint_name(step)}.tmp"
    together(lambda: make_room(root, step) if rank == 0 else None, group)
    try:
        dcp.save(fragments, storage_writer=JsonWriter(aside), process_group=group)
    except CheckpointException as error:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise _explain(error) from None
    own = {path.name: _fingerprint(path) for path in sorted(aside.glob(f"__{rank}_*"))}
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own, group=group)
    files = {name: mark for part in everyone for name, mark in part.items()}
    together(lambda: _publish(root, aside, final, files, state, carried or {}) if rank == 0 else None, group)
    return final


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank; where it fails on any, all raise that failure, so that nobody waits for the dead.

    A full disk, one that refuses writes, and a path that is not what it has to be are raised as StorageError; other
    ranks' failures by their class among the user's errors, or as RuntimeError.
    """
    failure: BaseException | None = None
    results: list[T] = []
    try:
        results.append(action())
    except OSError as error:
        failure = error if isinstance(error, AdambaError) else as_user_error(error, str(error.filename)) or error
    except Exception as error:
        failure = error
    told: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
    mine = None if failure is None else (type(failure).__name__, str(failure), socket.gethostname())
    dist.all_gather_object(told, mine, group=group)
    failed = {rank: words for rank, words in enumerate(told) if words is not None}
    if not failed:
        return results[0]
    first = min(failed)
    if failure is not None and (first == 0 or not isinstance(failure, AdambaError)):
        raise failure
    rank = first if failure is None else dist.get_rank()
    name, text, host = failed[rank]
    # the first rank's machine is where people look
    where = f" (on rank {rank}, {host})" if first else ""
    raise getattr(errors, name, RuntimeError)(text + where) from failure


def from_first_rank(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, which alone runs it; every rank calls this alike, and fails where it
    fails."""
    box = [together(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def _publish(
    root: Path,
    aside: Path,
    final: Path,
    files: dict[str, Any],
    state: dict[str, Any],
    carried: Mapping[str, bytes],
) -> None:
    for name, content in carried.items():
        write_atomically(aside / name, content)
    write_atomically(aside / STATE_FILE, json.dumps(state, indent=1).encode())
    for name in (METADATA_FILE, STATE_FILE, *carried):
        files[name] = _fingerprint(aside / name)
    write_atomically(aside / FILES_FILE, json.dumps(files, indent=1).encode())
    sync_directory(aside)
    put_in_place(aside, final, state.get("config", {}).get("run_id"))
    write_atomically(root / LATEST, final.name.encode())


def _explain(error: CheckpointException) -> BaseException:
    """The first user's error among the ranks' failures; where there is none, the whole report."""
    found = (failure for failure, _ in error.failures.values() if isinstance(failure, AdambaError))
    return next(found, error)


def _fingerprint(path: Path) -> dict[str, int]:
    """{"bytes", "crc32"} of a file, read in blocks."""
    checksum, size = 0, 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that `latest` names; the newest complete one where that name is missing or has no folder, as after
    a kill between two renames; None where the run never saved.

    Raises CheckpointError where `latest` is damaged, and where there are checkpoints and none is complete.
    """
    if (root.exists() or root.is_symlink()) and not root.is_dir():
        raise CheckpointError(f"{root}: is no folder, or a link to one that is not there; bring it back, or delete it")
    pointer, complete = root / LATEST, complete_folders(root)
    way_out = f"give --resume {complete[-1] if complete else 'FOLDER'}, or delete it: the newest complete one counts"
    name = None
    if pointer.exists() or pointer.is_symlink():
        if pointer.exists() and not pointer.is_file() and not pointer.is_dir():
            raise CheckpointError(f"{pointer}: is no regular file; {way_out}")
        try:
            name = pointer.read_text().strip()
        except OSError as error:
            raise CheckpointError(f"{pointer}: {error.strerror}; {way_out}") from None
        except ValueError:
            raise CheckpointError(f"{pointer}: damaged (not text); {way_out}") from None
        if len(name) > 255 or "\0" in name:
            raise CheckpointError(f"{pointer}: damaged (no name of a folder); {way_out}")
    if name and Path(name).name == name and (root / name).is_dir():
        return root / name
    if complete:
        return complete[-1]
    if unfinished := step_folders(root):
        raise CheckpointError(f"{unfinished[-1] / FILES_FILE}: is missing, and no checkpoint beside it is complete")
    if name is not None:
        raise CheckpointError(f"{pointer}: names {name!r}, which is not there; give --resume a checkpoint folder")
    return None


def verify_files(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compare sizes and checksums with `files.json`, this rank's share of them. CheckpointError names the file."""
    listed = read_files(folder)
    if not {METADATA_FILE, STATE_FILE} <= set(listed):
        raise CheckpointError(f"{folder / FILES_FILE}: damaged (not a list of files); use an earlier checkpoint")
    places = read_metadata(folder).storage_data.values()
    if unlisted := sorted({place.relative_path for place in places} - set(listed)):
        raise CheckpointError(f"{folder / FILES_FILE}: does not list {unlisted[0]}; use an earlier checkpoint")
    rank, ranks = share
    for name in sorted(listed)[rank::ranks]:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, or no file; use an earlier checkpoint")
        try:
            if path.stat().st_size != listed[name]["bytes"]:
                raise CheckpointError(
                    f"{path}: {path.stat().st_size} bytes of {listed[name]['bytes']}; use an earlier checkpoint"
                )
            if _fingerprint(path) != listed[name]:
                raise CheckpointError(f"{path}: damaged (checksum differs); use an earlier checkpoint")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); use an earlier checkpoint") from None


def read_files(folder: Path) -> Files:
    """Every other file of a training checkpoint, with size and checksum."""
    return read_json(folder / FILES_FILE, Files, CheckpointError, _EARLIER)


def read_state(folder: Path) -> StoredState:
    """The JSON part: step, samples, config."""
    return read_json(folder / STATE_FILE, StoredState, CheckpointError, _EARLIER)


def load_fragments(folder: Path, fragments: dict[str, Fragment], alone: bool = False) -> list[str]:
    """Fill this rank's fragments, which must all be in the checkpoint with their shapes. Every rank of the job calls it
    at the same time, unless this one reads `alone`.

    Returns names that the checkpoint holds and nobody asked for. Raises CheckpointError before anything is written.
    """
    reader = JsonReader(folder)
    # what no chunk covers would stay as it was, without a word
    held = WholeTensors(folder).entries
    for name, fragment in fragments.items():
        if name not in held:
            raise CheckpointError(f"{folder}: has no tensor {name}; it belongs to another model or setting")
        if tuple(held[name].size) != tuple(fragment.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(held[name].size)}, the model's is {tuple(fragment.shape)}"
            )
    try:
        dcp.load(fragments, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder}: cannot be read ({' '.join(str(first).split())[:200]})") from None
    return sorted(set(held) - set(fragments))


def held_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Name -> dtype of all tensors in a checkpoint."""
    return {name: entry.properties.dtype for name, entry in tensor_entries(read_metadata(folder)).items()}
