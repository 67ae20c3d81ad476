"""Canonical checkpoints: whole tensors in natural order under their own names, in safetensors shards with an index."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_adamba.checkpoint.dcp_json import JsonReader, read_metadata
from megatron_adamba.checkpoint.training import read_state, verify_files
from megatron_adamba.errors import CheckpointError
from megatron_adamba.files import as_storage_error, sync_directory, write_atomically

INDEX_FILE, CONFIG_FILE = "model.safetensors.index.json", "config.json"
MAX_SHARD_BYTES = 4 * 2**30
WEIGHT_PREFIX = "weight/"


def write_canonical(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    extra_files: Iterable[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write aside and rename; one shard is in memory at a time.

    config: JSON values, with the resolved model under `model`; extra_files are copied in under their own names.
    Raises StorageError where the disk is full.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        places = _write_shards(aside, tensors, max_shard_bytes)
        index = {"metadata": {"total_size": places.pop("")}, "weight_map": places}
        write_atomically(aside / INDEX_FILE, json.dumps(index, indent=1).encode())
        write_atomically(aside / CONFIG_FILE, json.dumps(config, indent=1).encode())
        for path in extra_files:
            write_atomically(aside / path.name, path.read_bytes())
        sync_directory(aside)
        old = folder.with_name(folder.name + ".replaced.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_directory(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        if isinstance(error, SafetensorError):
            error = OSError(28, str(error))
        raise as_storage_error(error, str(folder)) or error from None


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> dict[str, Any]:
    """Shards under provisional names, then `model-00001-of-00003.safetensors`; returns name -> file, "" -> bytes."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if pending and size + tensor_bytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + tensor_bytes, total + tensor_bytes
    if pending or not shards:
        flush()
    places: dict[str, Any] = {"": total}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / final)
        places.update(dict.fromkeys(names, final))
    return places


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file. Raises CheckpointError naming what is missing or damaged."""
    path = folder / INDEX_FILE
    try:
        places = json.loads(path.read_text())["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a folder that holds a canonical checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard}: missing, though {INDEX_FILE} names it")
    return places


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, one at a time, shard by shard."""
    places = read_index(folder)
    for shard in sorted(set(places.values())):
        path = folder / shard
        try:
            with safe_open(path, framework="pt") as stream:
                for name in sorted(name for name, place in places.items() if place == shard):
                    yield name, stream.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({' '.join(str(error).split())})") from None


def load_into(module: torch.nn.Module, folder: Path) -> None:
    """Fill a model; names and shapes are checked against the index and each tensor before it is copied.

    Raises CheckpointError naming the first tensor that is missing, unknown or of another shape.
    """
    parameters = dict(module.named_parameters())
    held = set(read_index(folder))
    if missing := sorted(set(parameters) - held):
        raise CheckpointError(f"{folder}: has no tensor {missing[0]}; its config.json describes another model")
    if unknown := sorted(held - set(parameters)):
        raise CheckpointError(f"{folder}: tensor {unknown[0]} has no place in this model")
    with torch.no_grad():
        for name, tensor in read_tensors(folder):
            if tensor.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(tensor)


def canonical_from_training(checkpoint: Path, folder: Path, extra_files: Iterable[Path] = ()) -> None:
    """Convert a training checkpoint in one process, a shard at a time: weights only, fp32 where they were trained.

    extra_files: copied in beside the weights, such as the tokenizer.
    """
    verify_files(checkpoint)
    state = read_state(checkpoint)
    write_canonical(folder, state["config"], _training_weights(checkpoint), extra_files)


def _training_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    entries = read_metadata(checkpoint).state_dict_metadata
    reader = JsonReader(checkpoint)
    for key, entry in entries.items():
        if key.startswith(WEIGHT_PREFIX):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*intent is to load in a single process.*")
                dcp.load({key: tensor}, storage_reader=reader, no_dist=True)
            yield key.removeprefix(WEIGHT_PREFIX), tensor
