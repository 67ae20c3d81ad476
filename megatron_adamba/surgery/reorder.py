"""Channels and units sorted by importance, so that narrow widths keep those that say most; full width is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import gate_manifest, stored_manifest
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.data.loader import MicroBatch
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.calibration import Calibration
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical, require_whole
from megatron_adamba.surgery.importance import Importance, measure
from megatron_adamba.surgery.narrow_importance import measure_narrow
from megatron_adamba.surgery.permutation import Order, random_order
from megatron_adamba.surgery.writing import Job, PlannedTensor

KINDS = ("hidden", "ffn", "heads", "experts")
"""in the order in which they are tried"""


@dataclass(frozen=True)
class Trial:
    """One ordering by one measure, and the loss over the narrow widths on each half of the text, in nats."""

    kind: str
    measure: str
    """activations (at full width) | effect (at the narrow widths, `narrow_importance`)"""
    before: tuple[float, float]
    after: tuple[float, float]

    @property
    def helps(self) -> bool:
        return all(after < before for after, before in zip(self.after, self.before))

    @property
    def gain(self) -> float:
        return (sum(self.before) - sum(self.after)) / 2


def reorder(
    source: Path,
    calibration: Calibration,
    recorded: dict[str, Any],
    kinds: Sequence[str] = KINDS,
    expect: Callable[[int], None] = lambda passes: None,
) -> tuple[Job, list[Trial]]:
    """Plan the same model in a better order: of the kinds, each is kept where it lowers the loss of narrow widths.

    recorded: what to remember of the text. expect: called with the number of passes over it, once that is known.
    Memory: two copies of the model in fp32, and its activations.
    Raises CheckpointError, ConfigError.
    """
    old = open_canonical(source)
    require_whole(old.config, source, "reorder")
    if len(old.config.nest) == 1:
        raise ConfigError(f"{source}: has one width alone ({old.config.widths[0]}), for which no order is better")
    model = AdambaModel(old.config, device="meta").to_empty(device="cpu").requires_grad_(False).eval()
    load_into(model, source, elsewhere={spec.name for spec in gate_manifest(old.config)})
    order, trials, kept = chosen_order(old, model, calibration, kinds, expect)
    losses = {f"{trial.kind} by {trial.measure}": [trial.before, trial.after] for trial in trials}
    names = [f"{trial.kind} by {trial.measure}" for trial in kept]
    arguments = {**recorded, "kept": names, "losses": losses}
    return _job(old, source, order, arguments, f"kept: {', '.join(names) or 'no ordering'}"), trials


def shuffle(source: Path, seed: int) -> Job:
    """Plan the same model in a random order: what an order by importance has to beat. Raises CheckpointError."""
    old = open_canonical(source)
    require_whole(old.config, source, "reorder")
    return _job(old, source, random_order(old.config, seed), {"random": seed}, "in a random order")


def _job(old: CanonicalSource, source: Path, order: Order, arguments: dict[str, Any], result: str) -> Job:
    plan = tuple(_planned(old, spec, order) for spec in stored_manifest(old.config))
    history = extended_history(source, "reorder", arguments, "canonical")
    promise = f"the logits are the source's at full width; {result}"
    values = old.opened.config
    if order != Order(old.config.head_dim):
        # old places of an earlier expansion no longer come first, so there is no telling old from new by sizes
        values = {**values, "model": asdict(replace(old.config, expanded_from=None))}
    return Job(plan, values, history, promise, old.tokenizer_files())


def chosen_order(
    source: CanonicalSource,
    model: AdambaModel,
    calibration: Calibration,
    kinds: Sequence[str],
    expect: Callable[[int], None] = lambda passes: None,
) -> tuple[Order, list[Trial], list[Trial]]:
    """The order, all trials, and those of them that it keeps. model: holds the source's weights, and is left in some
    order of them."""
    activations = measure(model, ((batch["tokens"], _documents(batch)) for batch in calibration))
    expect(2 + sum(_passes(activations, kind) for kind in kinds))
    order, best = Order(source.config.head_dim), calibration.narrow_losses(model)
    trials, kept = [], []
    for kind in kinds:
        measures = {"activations": activations}
        if kind in ("ffn", "heads"):
            # which units matter at a narrow width depends on the channels that it has
            fill(model, source, order)
            measures["effect"] = measure_narrow(model, calibration)
        candidates = []
        for name, importance in measures.items():
            if kind == "hidden" or getattr(importance, kind):
                candidate = with_kind(order, kind, importance)
                fill(model, source, candidate)
                candidates.append((Trial(kind, name, best, calibration.narrow_losses(model)), candidate))
        trials += [trial for trial, _ in candidates]
        helpful = [pair for pair in candidates if pair[0].helps]
        if helpful:
            trial, order = max(helpful, key=lambda pair: pair[0].gain)
            best = trial.after
            kept.append(trial)
    return order, trials, kept


def _passes(activations: Importance, kind: str) -> int:
    """Over the text, to try a kind: one a candidate, and one to measure effects."""
    if kind == "hidden":
        return 1
    there = bool(getattr(activations, kind))
    return 1 + 2 * there if kind in ("ffn", "heads") else int(there)


def _documents(batch: MicroBatch) -> Tensor | None:
    return batch["seq_idx"] if batch["packed"] else None


def with_kind(order: Order, kind: str, importance: Importance) -> Order:
    """The order and, of one kind, the most important first."""
    first = lambda values: values.argsort(dim=-1, descending=True, stable=True)
    if kind == "hidden":
        return replace(order, hidden=first(importance.hidden))
    if kind == "ffn":
        return replace(order, ffn={block: first(values) for block, values in importance.ffn.items()})
    if kind == "experts":
        return replace(order, experts={block: first(values) for block, values in importance.experts.items()})
    return replace(order, heads={block: _heads(values) for block, values in importance.heads.items()})


def _heads(values: Tensor) -> Tensor:
    """Groups by the sum of their heads, and in each group its heads. values: [kv_groups, heads of a group]."""
    groups, size = values.shape
    old = torch.arange(groups * size).view(groups, size)
    inside = old.gather(1, values.argsort(dim=1, descending=True, stable=True))
    return inside[values.sum(1).argsort(descending=True, stable=True)]


def fill(model: AdambaModel, source: CanonicalSource, order: Order) -> None:
    """The source's weights in this order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(order.apply(name, source.read(name)))


def _planned(old: CanonicalSource, spec: ParamSpec, order: Order) -> PlannedTensor:
    read = partial(old.read, spec.name)
    same = f"{spec.name}, reordered"
    return PlannedTensor(
        spec.name, spec.shape, old.dtype(spec.name), same, lambda: order.apply(spec.name, read()).contiguous()
    )
