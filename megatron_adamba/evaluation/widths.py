"""Losses on a fixed text, one row per plan. How the model is called is an argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.data.loader import to_micro_batch
from megatron_adamba.data.packed import EvaluationBatches
from megatron_adamba.elastic.plan import ElasticPlan, full_plan
from megatron_adamba.parallel.topology import Topology

ForwardPolicy = Callable[[Tensor, Tensor, Tensor | None, ElasticPlan], Tensor]
"""(tokens, labels, seq_idx or None, plan), each [batch, seq], to losses in nats [batch, seq], 0 where unscored."""


@dataclass(frozen=True)
class EvaluationRow:
    """What one plan costs and what it predicts."""

    width: int
    nats_per_token: float
    bits_per_byte: float | None
    """over all bytes of the scored documents; None where their number is not known"""
    flops_per_token: int
    """active forward FLOPs"""
    tokens: int
    bytes: int | None
    exit_layer: int | None = None
    """blocks that ran; None: all of them"""


def evaluate_plans(
    forward: ForwardPolicy,
    config: ResolvedModel,
    batches: EvaluationBatches,
    plans: Sequence[ElasticPlan],
    device: torch.device,
    topology: Topology,
    report: Callable[[], None] = lambda: None,
) -> list[EvaluationRow]:
    """Score every token of `batches` under each plan, the batches dealt to the data-parallel ranks round-robin.

    Every rank makes the same number of calls, with nothing to score where it has run out of batches. All ranks return
    the same rows. report: called behind each batch under each plan.
    """
    rank, ranks = topology.place("dp"), topology.size("dp")
    totals = torch.zeros(len(plans), dtype=torch.float64)
    seq_len = 1
    with torch.no_grad():
        for first in range(0, len(batches), ranks):
            number = first + rank
            batch = to_micro_batch(batches[min(number, len(batches) - 1)])
            tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)
            seq_idx = batch["seq_idx"].to(device) if batch["packed"] else None
            seq_len = tokens.shape[1]
            if number >= len(batches):
                labels = torch.full_like(labels, -100)
            for index, plan in enumerate(plans):
                totals[index] += forward(tokens, labels, seq_idx, plan).sum(dtype=torch.float64).cpu()
                report()
    if ranks > 1:
        shared = totals.to(device)
        dist.all_reduce(shared, group=topology.group("dp"))
        totals = shared.cpu()
    return [_row(config, plan, total.item(), batches, seq_len) for plan, total in zip(plans, totals)]


def exit_plans(config: ResolvedModel, first: int, most: int) -> list[ElasticPlan]:
    """Full width up to each exit layer from `first` on, without the last block's; at most `most`, evenly spread."""
    layers = range(first, config.num_layers)
    count = min(len(layers), most)
    chosen = sorted({layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)})
    return [replace(full_plan(config), exit_layer=layer) for layer in chosen]


def _row(
    config: ResolvedModel, plan: ElasticPlan, total: float, batches: EvaluationBatches, seq_len: int
) -> EvaluationRow:
    return EvaluationRow(
        width=max(plan.widths),
        nats_per_token=total / max(batches.num_tokens, 1),
        bits_per_byte=total / math.log(2) / batches.num_bytes if batches.num_bytes else None,
        flops_per_token=forward_flops(config, plan.widths, seq_len, plan.exit_layer),
        tokens=batches.num_tokens,
        bytes=batches.num_bytes,
        exit_layer=plan.exit_layer if plan.exit_layer < config.num_layers else None,
    )
