"""Canonical checkpoints: whole tensors in natural order under their own names, in safetensors shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_adamba.checkpoint.aside import written_aside
from megatron_adamba.checkpoint.carried import carried_files
from megatron_adamba.checkpoint.formats import Index
from megatron_adamba.checkpoint.history import HISTORY_FILE, trained_history
from megatron_adamba.checkpoint.shards import TensorInfo, checksum, shard_name, stream_shards
from megatron_adamba.checkpoint.training import read_state, verify_files
from megatron_adamba.checkpoint.whole_tensors import WholeTensors
from megatron_adamba.errors import CheckpointError
from megatron_adamba.files import write_atomically
from megatron_adamba.schema import read_json

INDEX_FILE, CONFIG_FILE = "model.safetensors.index.json", "config.json"
_RESTORE = "give a folder that holds a canonical checkpoint, or restore the file"
MAX_SHARD_BYTES = 4 * 2**30
WEIGHT_PREFIX = "weight/"


def write_canonical(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    extra_files: Iterable[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    infos: Mapping[str, TensorInfo] | None = None,
    history: list[dict[str, Any]] | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> None:
    """Write aside and rename; one shard is in memory at a time, one tensor where `infos` is given.

    config: JSON values, with the resolved model under `model`; extra_files are copied in under their own names; infos:
    what `tensors` will yield, in the same order; history: what was done to the weights, where anything was; contents:
    more files, by name. Raises StorageError where the disk is full.
    """
    with written_aside(folder) as aside:
        if infos is None:
            infos, places, sums = _write_shards(aside, tensors, max_shard_bytes)
        else:
            places, sums = stream_shards(aside, infos, tensors, max_shard_bytes)
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": places, "crc32": sums}
        write_atomically(aside / INDEX_FILE, json.dumps(index, indent=1).encode())
        write_atomically(aside / CONFIG_FILE, json.dumps(config, indent=1).encode())
        if history:
            write_atomically(aside / HISTORY_FILE, (json.dumps(history, indent=1) + "\n").encode())
        files = {path.name: path.read_bytes() for path in extra_files} | dict(contents or {})
        for name, content in files.items():
            write_atomically(aside / name, content)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int]]:
    """Shards under provisional names, then `model-00001-of-00003.safetensors`; returns what was in them, where, and
    each tensor's checksum."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    infos: dict[str, TensorInfo] = {}
    sums: dict[str, int] = {}
    size = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(28, str(error)) from None
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        info = infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if pending and size + info.num_bytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        sums[name] = checksum(pending[name])
        size += info.num_bytes
    if pending or not shards:
        flush()
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = shard_name(number, len(shards))
        (folder / f"part-{number}").rename(folder / final)
        places.update(dict.fromkeys(names, final))
    return infos, places, sums


def read_checksums(folder: Path) -> dict[str, int]:
    """CRC-32 by tensor; none where others wrote the folder. Raises CheckpointError."""
    return read_json(folder / INDEX_FILE, Index, CheckpointError, _RESTORE).get("crc32", {})


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file. Raises CheckpointError naming what is missing or damaged."""
    path = folder / INDEX_FILE
    places = read_json(path, Index, CheckpointError, _RESTORE)["weight_map"]
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            what = "no regular file" if (folder / shard).exists() else "missing"
            raise CheckpointError(f"{folder / shard}: {what}, though {INDEX_FILE} names it")
    return places


def read_tensors(
    folder: Path, wanted: Container[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, or those wanted, one at a time, shard by shard; verify: against their checksums."""
    sums = read_checksums(folder) if verify else {}
    places = {name: place for name, place in read_index(folder).items() if wanted is None or name in wanted}
    for shard in sorted(set(places.values())):
        for name in sorted(name for name, place in places.items() if place == shard):
            yield name, read_tensor(folder / shard, name, sums.get(name))


def read_tensor(path: Path, name: str, crc32: int | None = None) -> Tensor:
    """One tensor of a shard. Raises CheckpointError where the file is damaged, or the tensor has not the checksum."""
    try:
        # opened anew for every tensor: a mapping that stays open keeps every page that was read from it
        with safe_open(path, framework="pt") as stream:
            tensor = stream.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({' '.join(str(error).split())})") from None
    if crc32 is not None and checksum(tensor) != crc32:
        raise wrong_checksum(path, name)
    return tensor


def wrong_checksum(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({name} is not what was written, its checksum differs); restore the file from a copy"
    )


def load_into(
    module: torch.nn.Module,
    folder: Path,
    share: Callable[[str, Tensor], Tensor] = lambda _, whole: whole,
    elsewhere: Set[str] = frozenset(),
    verify: bool = True,
) -> None:
    """Fill a model; names and shapes are checked against the index and each tensor before it is copied.

    share: what the module holds of a whole tensor, by its name; elsewhere: names that other pipeline stages hold;
    verify: hold tensors against their checksums, where the folder has them.
    Raises CheckpointError naming the first tensor that is missing, unknown or of another shape.
    """
    parameters = dict(module.named_parameters())
    held = set(read_index(folder))
    if missing := sorted(set(parameters) - held):
        raise CheckpointError(f"{folder}: has no tensor {missing[0]}; its config.json describes another model")
    if unknown := sorted(held - set(parameters) - elsewhere):
        raise CheckpointError(f"{folder}: tensor {unknown[0]} has no place in this model")
    with torch.no_grad():
        for name, tensor in read_tensors(folder, parameters, verify):
            part = share(name, tensor)
            if part.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(part.shape)}, the model's is {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(part)


def canonical_from_training(checkpoint: Path, folder: Path, carried: Mapping[str, bytes] | None = None) -> None:
    """Convert a training checkpoint in one process, a tensor at a time: weights only, fp32 where they were trained.

    carried: the tokenizer's files, by name; None takes those that the checkpoint carries. Raises CheckpointError.
    """
    verify_files(checkpoint)
    state = read_state(checkpoint)
    if "config" not in state:
        raise CheckpointError(f"{checkpoint}: its state holds no config; use an earlier checkpoint")
    held = WholeTensors(checkpoint)
    keys = {key.removeprefix(WEIGHT_PREFIX): key for key in held.infos if key.startswith(WEIGHT_PREFIX)}
    infos = {name: held.infos[key] for name, key in keys.items()}
    tensors = ((name, held.read(key)) for name, key in keys.items())
    history, contents = trained_history(checkpoint, state), carried_files(checkpoint) if carried is None else carried
    write_canonical(folder, state["config"], tensors, infos=infos, history=history, contents=contents)
