"""Per-token exits and widths over whole sequences, without caches: what decoding step by step must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import expansion_layers
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.inference.policy import AdaptivePolicy, doubled_widths
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.adamba import AdambaModel


@dataclass(frozen=True)
class AdaptiveTrace:
    """What every token took; int64 [batch, seq]."""

    exit_layers: Tensor
    """blocks that ran"""
    widened_at: Tensor
    """first block that ran, or would have run, at the doubled width; the number of blocks for none"""


@torch.no_grad()
def run_adaptively(
    model: AdambaModel,
    gates: Gates,
    reading: GateReading,
    tokens: Tensor,
    plans: Sequence[ElasticPlan],
    policy: AdaptivePolicy,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, AdaptiveTrace]:
    """Residual where each token left, [batch, seq, hidden_size], and what each took.

    tokens: [batch, seq]; plans: the widths of each sequence, to the last block. A token that has left goes on as keys,
    values and Mamba inputs of the layers above, computed from the residual that it left with; of layers past three
    quarters of the depth every token has keys and values at both widths, and a query reads those of its own.
    """
    config = model.config
    context = model.training_context(tokens, seq_idx)
    widened, depth = expansion_layers(config), config.num_layers
    wide_widths = [doubled_widths(config, plan.widths) for plan in plans]
    x = model.embedding(tokens)
    exit_layers = torch.full(tokens.shape, depth, device=tokens.device)
    widened_at = torch.full(tokens.shape, depth, device=tokens.device)
    for index in range(depth):
        active, wide = exit_layers == depth, widened_at <= index
        y = _block(model, index, x, [plan.widths[index] for plan in plans], context)
        if index in widened and bool((wide & active).any()):
            wider = _block(model, index, x, [widths[index] for widths in wide_widths], context)
            y = torch.where(wide[..., None], wider, y)
        x = torch.where(active[..., None], y, x)
        run = index + 1
        if run == depth:
            break
        if run >= policy.min_exit_layer and policy.exit_threshold < 1:
            leaves = policy.leaves(gates, reading, run, x)
            exit_layers = torch.where(active & leaves, run, exit_layers)
        if run in widened:
            grows = policy.widens(gates, reading, run, x) & (exit_layers == depth) & (widened_at == depth)
            widened_at = torch.where(grows, run, widened_at)
    return x, AdaptiveTrace(exit_layers, widened_at)


def _block(model: AdambaModel, index: int, x: Tensor, widths: list[int], context: ForwardContext) -> Tensor:
    """All tokens through a block, each sequence at its width. x: [batch, seq, hidden_size]."""
    rows, block = model.rows[index], model.blocks[index]
    chosen = [rows[width].width for width in widths]
    if len(set(chosen)) == 1:
        return block(x, rows[chosen[0]], context)
    out = torch.empty_like(x)
    for width in set(chosen):
        mine = torch.tensor([own == width for own in chosen], device=x.device)
        out[mine] = block(x[mine], rows[width], _of_rows(context, mine))
    return out


def _of_rows(context: ForwardContext, rows: Tensor) -> ForwardContext:
    """The context of some of the sequences; rows: [batch] bool."""
    masks = {w: mask if mask is None or mask.shape[0] == 1 else mask[rows] for w, mask in context.masks.items()}
    return replace(context, masks=masks, seq_idx=None if context.seq_idx is None else context.seq_idx[rows])
