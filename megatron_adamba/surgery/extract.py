"""A part of a nested model as a model of its own: what one plan runs, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.elastic.sampler import earliest_exit
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.requested import requested_plan
from megatron_adamba.surgery.sources import OWN_DTYPES, TensorFolder
from megatron_adamba.surgery.writing import Job, PlannedTensor

_PROMISE = "the logits are the source's at the same widths"


def extract(
    source: Path,
    width: int | None = None,
    widths: list[int] | None = None,
    exit_layer: int | None = None,
    verify: bool = True,
) -> Job:
    """Plan the model of a plan: `width` in every block, or `widths`, up to `exit_layer`.

    Its widths below, with their gains, stay; so do hidden size, embedding, head, final norm and Mamba mixers. verify:
    hold tensors against their checksums, for which all of their bytes are read.
    Raises CheckpointError, ConfigError.
    """
    if width is None and widths is None and exit_layer is None:
        raise ConfigError("extract: nothing says what; give --width, --widths or --exit-layer, for example --width 512")
    old = open_canonical(source)
    plan = requested_plan(old.config, source, width, widths, exit_layer)
    config = _extracted_config(old.config, plan)
    folder = TensorFolder(source, OWN_DTYPES)
    tensors = tuple(_leading(spec, old, folder, verify) for spec in stored_manifest(config))
    values = {**old.opened.config, "model": asdict(config), **_same_exits(old)}
    arguments = {"widths": list(plan.widths[: plan.exit_layer]), "exit_layer": plan.exit_layer}
    history = extended_history(source, "extract", arguments, "canonical")
    return Job(tensors, values, history, _promise(old.config, plan), old.tokenizer_files())


def _extracted_config(old: ResolvedModel, plan: ElasticPlan) -> ResolvedModel:
    own = list(plan.widths[: plan.exit_layer])
    letters = old.block_pattern[: plan.exit_layer]
    rows = [replace(row) for row in old.nest if row.width <= max(own)]
    widest = rows[-1]
    config = replace(
        old,
        block_pattern=letters,
        num_layers=len(letters),
        nest=rows,
        widths=None,
        layer_widths=own,
        num_heads=widest.kv_groups * (old.num_heads // old.num_kv_groups),
        num_kv_groups=widest.kv_groups,
        ffn_size=widest.ffn,
    )
    if "E" in letters:
        config = replace(config, expert_ffn_size=widest.expert_ffn)
    else:
        without = [replace(row, expert_ffn=0) for row in rows]
        config = replace(config, num_experts=0, expert_ffn_size=None, nest=without)
    if len(letters) < 2:
        config = replace(config, gate_size=0)
    if set(own) == {old.hidden_size}:
        # all of every block: an ordinary model
        config = replace(config, layer_widths=None)
    else:
        # of what an expansion added a part is gone, so there is no telling old from new by sizes
        config = replace(config, expanded_from=None)
    return resolve_model(config)


def _same_exits(old: CanonicalSource) -> dict[str, Any]:
    """Exits begin where they began, though the depth that they are derived from may be another."""
    elastic = old.opened.config.get("elastic")
    if not old.config.gate_size or not isinstance(elastic, dict):
        return {}
    return {
        "elastic": {**elastic, "min_exit_layer": elastic.get("min_exit_layer") or earliest_exit(old.config.num_layers)}
    }


def _leading(spec: ParamSpec, old: CanonicalSource, folder: TensorFolder, verify: bool) -> PlannedTensor:
    """Widths and units nest, and blocks are left out at the end alone: every tensor is the beginning of its namesake,
    along every axis."""
    if spec.name not in old.opened.weights:
        # its last quarter begins earlier: what lets tokens of it widen is yet to learn
        fresh = partial(initial_tensor, spec, 0)
        return PlannedTensor(spec.name, spec.shape, torch.float32, f"new: {spec.init}", fresh)
    whole = old.opened.weights[spec.name].shape
    origin = spec.name if whole == spec.shape else f"{spec.name}, the beginning of {list(whole)}"

    def read() -> Tensor:
        if verify:
            folder.check(spec.name)
        return folder.leading(spec.name, spec.shape)

    return PlannedTensor(spec.name, spec.shape, old.dtype(spec.name), origin, read)


def _promise(old: ResolvedModel, plan: ElasticPlan) -> str:
    left = range(plan.exit_layer, old.num_layers)
    if not left:
        return _PROMISE
    which = f"blocks {left[0]} to {left[-1]} are" if len(left) > 1 else f"block {left[0]} is"
    return f"{_PROMISE}; {which} left out"
