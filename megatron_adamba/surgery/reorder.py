"""Channels and units sorted by importance, so that narrow widths keep those that say most; full width is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.data.loader import to_micro_batch
from megatron_adamba.data.packed import EvaluationBatches
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.evaluation.widths import evaluate_plans
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.parallel.topology import single_process
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.importance import Importance, measure
from megatron_adamba.surgery.permutation import Order, random_order
from megatron_adamba.surgery.writing import Job, PlannedTensor

KINDS = ("hidden", "ffn", "heads", "experts")
"""in the order in which they are tried"""


@dataclass(frozen=True)
class Trial:
    """One ordering, and the mean loss over the narrow widths, in nats, without and with it."""

    kind: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before


def reorder(
    source: Path, batches: EvaluationBatches, calibration: dict[str, Any], kinds: Sequence[str] = KINDS
) -> tuple[Job, list[Trial]]:
    """Plan the same model in a better order: of the kinds, each is kept where it lowers the loss of narrow widths.

    batches: the calibration text; calibration: what to record of it. Memory: two copies of the model in fp32.
    Raises CheckpointError, ConfigError.
    """
    old = open_canonical(source)
    if len(old.config.nest) == 1:
        raise ConfigError(f"{source}: has one width alone ({old.config.widths[0]}), for which no order is better")
    model = AdambaModel(old.config, device="meta").to_empty(device="cpu").requires_grad_(False).eval()
    load_into(model, source)
    order, trials = chosen_order(old, model, batches, kinds)
    kept = [trial.kind for trial in trials if trial.kept]
    arguments = {**calibration, "kept": kept, "losses": {t.kind: [t.before, t.after] for t in trials}}
    return _job(old, source, order, arguments, f"kept: {', '.join(kept) or 'no ordering'}"), trials


def shuffle(source: Path, seed: int) -> Job:
    """Plan the same model in a random order: what an order by importance has to beat. Raises CheckpointError."""
    old = open_canonical(source)
    return _job(old, source, random_order(old.config, seed), {"random": seed}, "in a random order")


def _job(old: CanonicalSource, source: Path, order: Order, arguments: dict[str, Any], result: str) -> Job:
    plan = tuple(_planned(old, spec, order) for spec in manifest(old.config))
    history = extended_history(source, "reorder", arguments, "canonical")
    promise = f"the logits are the source's at full width; {result}"
    return Job(plan, old.opened.config, history, promise, old.tokenizer_files())


def chosen_order(
    source: CanonicalSource, model: AdambaModel, batches: EvaluationBatches, kinds: Sequence[str]
) -> tuple[Order, list[Trial]]:
    """model: holds the source's weights, and is left in some order of them."""
    importance = measure(model, _tokens(batches))
    order = Order(source.config.head_dim)
    best, trials = narrow_loss(model, batches), []
    for kind in kinds:
        if kind != "hidden" and not getattr(importance, kind):
            continue
        candidate = with_kind(order, kind, importance)
        fill(model, source, candidate)
        trial = Trial(kind, best, narrow_loss(model, batches))
        trials.append(trial)
        if trial.kept:
            order, best = candidate, trial.after
    return order, trials


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


def narrow_loss(model: AdambaModel, batches: EvaluationBatches) -> float:
    """Mean over the widths below the largest, nats per token."""
    config: ModelConfig = model.config
    plans = [uniform_plan(config, width) for width in config.widths[:-1]]
    score = lambda tokens, labels, seq_idx, plan: model(tokens, labels, seq_idx, plan, reduction="none")
    rows = evaluate_plans(score, config, batches, plans, torch.device("cpu"), single_process())
    return sum(row.nats_per_token for row in rows) / len(rows)


def _tokens(batches: EvaluationBatches):
    for number in range(len(batches)):
        batch = to_micro_batch(batches[number])
        yield batch["tokens"], batch["seq_idx"] if batch["packed"] else None


def _planned(old: CanonicalSource, spec: ParamSpec, order: Order) -> PlannedTensor:
    read = partial(old.read, spec.name)
    same = f"{spec.name}, reordered"
    return PlannedTensor(
        spec.name, spec.shape, old.dtype(spec.name), same, lambda: order.apply(spec.name, read()).contiguous()
    )
