"""Checkpoints of both kinds, read and converted by one process without a model or a job, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_adamba.blueprint.degrees import legal_tp_degrees, obstacle
from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHT_PREFIX,
    canonical_from_training,
    read_checksums,
    read_index,
    read_tensor,
)
from megatron_adamba.checkpoint.carried import carried_files
from megatron_adamba.checkpoint.chunk_writer import write_training
from megatron_adamba.checkpoint.dcp_json import METADATA_FILE
from megatron_adamba.checkpoint.history import read_history
from megatron_adamba.checkpoint.shards import DTYPE_CODES, TensorInfo
from megatron_adamba.checkpoint.training import FILES_FILE, LATEST, STATE_FILE, latest_checkpoint, read_state
from megatron_adamba.checkpoint.whole_tensors import WholeTensors
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import StoredConfig, model_config_from_dict, read_run_config
from megatron_adamba.errors import CheckpointError, ConfigError

TRAINING, CANONICAL = "training", "canonical"
START = {"step": 0, "consumed_samples": 0, "optimizer_steps": 0, "skipped": 0, "skipped_in_a_row": 0}
"""counters of a run that has not made a step"""
_EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpenCheckpoint:
    """What a checkpoint holds, and how its tensors are read. Names are those of training checkpoints in both kinds:
    `weight/NAME`, `exp_avg/NAME` and so on, with the canonical NAME."""

    kind: str
    """training | canonical"""
    folder: Path
    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any]
    """of the run, with the model under `model`"""
    state: Mapping[str, Any]
    """state.json of a training checkpoint; empty for a canonical one"""
    tensors: WholeTensors | None = None
    """of a training checkpoint"""

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """By canonical name."""
        names = (key for key in self.infos if key.startswith(WEIGHT_PREFIX))
        return {key.removeprefix(WEIGHT_PREFIX): self.infos[key] for key in names}


def kind_of(folder: Path) -> str | None:
    """training | canonical by the files in a folder, damaged or not; None where none of them is there."""
    if any((folder / name).exists() for name in (METADATA_FILE, STATE_FILE, FILES_FILE)):
        return TRAINING
    if any((folder / name).exists() for name in (INDEX_FILE, CONFIG_FILE)):
        return CANONICAL
    return None


def find_checkpoint(path: Path) -> tuple[str, Path]:
    """Kind and folder of a checkpoint, or of the latest in a run's `checkpoints`. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give RUN/checkpoints, one of its folders, or RUN/model")
    if (kind := kind_of(path)) is not None:
        return kind, path
    try:
        latest = latest_checkpoint(path)
    except ValueError as error:
        raise CheckpointError(f"{path / LATEST}: damaged ({error}); give one of the folders beside it") from None
    if latest is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give RUN/checkpoints, one of its folders, or RUN/model")
    return TRAINING, latest


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """Reads names, shapes and config. Raises CheckpointError naming what is missing or damaged."""
    kind, folder = find_checkpoint(path)
    return _open_training(folder) if kind == TRAINING else _open_canonical(folder)


def _open_training(folder: Path) -> OpenCheckpoint:
    state = read_state(folder)
    if "config" not in state or "counters" not in state:
        raise CheckpointError(f"{folder / STATE_FILE}: damaged (no config or no counters); use an earlier checkpoint")
    tensors = WholeTensors(folder)
    return OpenCheckpoint(TRAINING, folder, tensors.infos, tensors.read, state["config"], state, tensors)


def _open_canonical(folder: Path) -> OpenCheckpoint:
    places, sums = read_index(folder), read_checksums(folder)
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(places.values())):
        found = _shard_infos(folder / shard)
        named = {name for name, place in places.items() if place == shard}
        if lost := sorted(named - set(found)):
            raise CheckpointError(f"{folder / shard}: has no tensor {lost[0]}, though {INDEX_FILE} says so")
        if unknown := sorted(set(found) - named):
            raise CheckpointError(f"{folder / shard}: holds {unknown[0]}, which {INDEX_FILE} does not know")
        infos |= {WEIGHT_PREFIX + name: info for name, info in found.items()}

    def read(key: str) -> Tensor:
        name = key.removeprefix(WEIGHT_PREFIX)
        return read_tensor(folder / places[name], name, sums.get(name))

    infos = {WEIGHT_PREFIX + name: infos[WEIGHT_PREFIX + name] for name in places}
    return OpenCheckpoint(CANONICAL, folder, infos, read, _read_config(folder), {})


def _shard_infos(path: Path) -> dict[str, TensorInfo]:
    """The library compares the header with the size of the file."""
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    infos = {}
    try:
        with safe_open(path, framework="pt") as stream:
            names = stream.keys()
            for name in names:
                part = stream.get_slice(name)
                if part.get_dtype() not in dtypes:
                    raise CheckpointError(f"{path}: {name} is {part.get_dtype()}; checkpoints hold {', '.join(dtypes)}")
                infos[name] = TensorInfo(tuple(part.get_shape()), dtypes[part.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({' '.join(str(error).split())})") from None
    return infos


def _read_config(folder: Path) -> StoredConfig:
    try:
        return read_run_config(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def described_model(checkpoint: OpenCheckpoint) -> tuple[ResolvedModel, tuple[ParamSpec, ...]]:
    """The model that a checkpoint says it holds, and its parameters, those of gates too. Raises CheckpointError."""
    source = str(checkpoint.folder / (STATE_FILE if checkpoint.kind == TRAINING else CONFIG_FILE))
    try:
        model = resolve_model(model_config_from_dict(checkpoint.config["model"], source))
        if model.vocab_size is None:
            raise ConfigError("the model section has no vocab_size; restore the file")
        return model, stored_manifest(model)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None


def check_weights(checkpoint: OpenCheckpoint) -> tuple[ResolvedModel, tuple[ParamSpec, ...]]:
    """`described_model`, once names and shapes of all weights agree with it. Raises CheckpointError naming a tensor."""
    model, specs = described_model(checkpoint)
    weights, folder = checkpoint.weights, checkpoint.folder
    for spec in specs:
        if spec.name not in weights:
            raise CheckpointError(f"{folder}: has no tensor {spec.name}, which the model of its config has")
        if weights[spec.name].shape != spec.shape:
            raise CheckpointError(
                f"{folder}: {spec.name} has shape {weights[spec.name].shape}, the model of its config {spec.shape}"
            )
    if unknown := sorted(set(weights) - {spec.name for spec in specs}):
        raise CheckpointError(f"{folder}: tensor {unknown[0]} has no place in the model of its config")
    return model, specs


def to_canonical(source: OpenCheckpoint, target: Path, carried: Mapping[str, bytes] | None = None) -> None:
    """The weights of a training checkpoint as a canonical one; carried: as in `canonical_from_training`.

    Raises CheckpointError naming what is damaged."""
    check_weights(source)
    canonical_from_training(source.folder, target, carried)


def to_training(source: OpenCheckpoint, target: Path, tp: int, dp: int) -> None:
    """A canonical checkpoint as one that a run resumes from at step 0: fp32 weights, no optimizer state.

    tp, dp: the layout whose ranks' files are written (`chunk_writer.rank_pieces`); a run of any layout reads them.
    Raises ConfigError where the model cannot be cut so, CheckpointError where something that a run compares is missing.
    """
    model, specs = check_weights(source)
    if tp > 1 and (why := obstacle(model, tp)) is not None:
        raise ConfigError(f"--tp {tp}: {why}; this model takes {legal_tp_degrees(model)}")
    if not isinstance(source.config.get("tokenizer_hash"), str):
        raise CheckpointError(
            f"{source.folder / CONFIG_FILE}: has no `tokenizer_hash`, which a run compares before it resumes; add it"
        )
    for name, info in source.weights.items():
        if info.dtype not in _EXACT_IN_FP32:
            raise CheckpointError(f"{source.folder}: {name} is {info.dtype}, which the weights' fp32 does not hold")
    layout, history = {"tp": tp, "dp": dp}, read_history(source.folder)
    state = {"counters": START, "config": source.config, "layout": layout, "history": history}
    tensors = ((spec, source.read(WEIGHT_PREFIX + spec.name).to(torch.float32)) for spec in specs)
    write_training(target, state, tensors, tp, dp, carried_files(source.folder))
