"""Mamba blocks between the blocks of a trained model: new layers whose output is zero at first."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.pattern import parse_pattern
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.sampler import earliest_exit
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.writing import Job, PlannedTensor

PROMISE = "the logits are the source's at every width: every new block adds zero until it is trained"


def graft(source: Path, pattern: str, mamba: dict[str, Any], seed: int) -> Job:
    """Plan the model of `pattern`, whose blocks without the M are the source's, in order.

    mamba: settings of the new blocks by their name in ModelConfig; what is left out is the source's.
    seed: with each tensor's new name it decides its initial values, as in a model made from scratch.
    Raises CheckpointError, ConfigError.
    """
    old = open_canonical(source)
    config = _grafted_config(old.config, pattern, mamba)
    origins = _origins(config.block_pattern)
    # vectors (time steps, decays) keep fp32; matrices take the dtype of the trained ones
    dtype = old.dtype("embedding.weight")
    plan = []
    for spec in stored_manifest(config):
        name = _old_name(spec.name, origins)
        if name is None or name not in old.opened.weights:
            # of new blocks, and gates behind what was the last block, or that now lie in the last quarter
            plan.append(_new(spec, seed, dtype))
        elif spec.name.startswith("predictor.down."):
            plan.append(_spread(spec, name, old, origins))
        else:
            plan.append(_kept(spec, name, old))
    values = {**old.opened.config, "model": asdict(config), **_moved_exits(old, origins)}
    arguments = {"pattern": config.block_pattern, "seed": seed, **{key: mamba[key] for key in sorted(mamba)}}
    history = extended_history(source, "graft", arguments, "canonical")
    return Job(tuple(plan), values, history, PROMISE, old.tokenizer_files())


def _grafted_config(old: ResolvedModel, pattern: str, mamba: dict[str, Any]) -> ResolvedModel:
    try:
        letters = "".join(parse_pattern(pattern, None))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model.block_pattern", "--pattern")) from None
    if "M" in old.block_pattern:
        raise ConfigError(f"--pattern {pattern}: the source has M blocks already ({old.block_pattern})")
    if letters.replace("M", "") != old.block_pattern:
        raise ConfigError(
            f"--pattern {pattern}: without its M blocks it is {letters.replace('M', '')}, the source is "
            f"{old.block_pattern}; old blocks stay, in order, for example --pattern {_example(old.block_pattern)}"
        )
    if "M" not in letters:
        raise ConfigError(f"--pattern {pattern}: adds no M block; for example --pattern {_example(old.block_pattern)}")
    changes = {"expanded_from": None, "layer_widths": _layer_widths(old, letters), **mamba}
    config = replace(old, block_pattern=letters, num_layers=None, **changes)
    try:
        config.check()
        return resolve_model(config)
    except ConfigError as error:
        raise ConfigError(_as_flags(str(error))) from None


def _layer_widths(old: ResolvedModel, letters: str) -> list[int] | None:
    """Old blocks keep theirs, where they have them; new ones take the largest."""
    if old.layer_widths is None:
        return None
    kept = iter(old.layer_widths)
    return [old.widths[-1] if letter == "M" else next(kept) for letter in letters]


def _as_flags(text: str) -> str:
    """Our own spelling of the settings: --mamba-num-heads for --model.mamba_num_heads."""
    words = (
        "--" + word.removeprefix("--model.").replace("_", "-") if word.startswith("--model.mamba_") else word
        for word in text.split(" ")
    )
    return " ".join(words)


def _example(letters: str) -> str:
    """One M behind every second block."""
    return "".join(letters[i : i + 2] + "M" for i in range(0, len(letters), 2))


def _origins(new: str) -> dict[int, int]:
    """Place of a block in the new pattern -> its place in the old one; M blocks have none."""
    kept = [index for index, letter in enumerate(new) if letter != "M"]
    return {place: index for index, place in enumerate(kept)}


def _old_name(name: str, origins: dict[int, int]) -> str | None:
    """Name of the tensor in the source, None for one of a new block."""
    if not name.startswith("blocks."):
        return name
    _, index, rest = name.split(".", 2)
    place = origins.get(int(index))
    return None if place is None else f"blocks.{place}.{rest}"


def _spread(spec: ParamSpec, name: str, old: CanonicalSource, origins: dict[int, int]) -> PlannedTensor:
    """One row a block: old ones go with theirs, new blocks have zeros."""

    def make() -> Tensor:
        rows = old.read(name)
        spread = rows.new_zeros(spec.shape)
        spread[list(origins)] = rows[list(origins.values())]
        return spread

    return PlannedTensor(spec.name, spec.shape, old.dtype(name), f"{name}, a row for each old block", make)


def _moved_exits(old: CanonicalSource, origins: dict[int, int]) -> dict[str, Any]:
    """The earliest exit stays behind the same old block."""
    elastic = old.opened.config.get("elastic")
    if not old.config.gate_size or not isinstance(elastic, dict):
        return {}
    first = elastic.get("min_exit_layer") or earliest_exit(old.config.num_layers)
    place = next(new for new, index in origins.items() if index == min(first, len(origins)) - 1)
    return {"elastic": {**elastic, "min_exit_layer": place + 1}}


def _kept(spec: ParamSpec, name: str, old: CanonicalSource) -> PlannedTensor:
    return PlannedTensor(spec.name, spec.shape, old.dtype(name), name, partial(old.read, name))


def _new(spec: ParamSpec, seed: int, matrix_dtype: torch.dtype) -> PlannedTensor:
    dtype = torch.float32 if spec.kind == "vector" else matrix_dtype
    return PlannedTensor(
        spec.name, spec.shape, dtype, f"new: {spec.init}", lambda: initial_tensor(spec, seed).to(dtype)
    )
