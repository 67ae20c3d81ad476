"""How well gates foresee what leaving costs: over the answers of items, layer by layer, at full width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.inference.items import Item, ItemResult, batches, residuals
from megatron_adamba.inference.load import LoadedModel


@dataclass(frozen=True)
class GateQuality:
    """Of the answer tokens of some items."""

    squared_error: float
    """of the gates, mean over layers and tokens"""
    variance: float
    """of their targets about each layer's own mean, mean over layers and tokens"""
    extra_loss: float
    """mean nats over tokens whose confidence passes at some layer, at the first such, all other tokens run to the end,
    against the last layer"""
    leaving: float
    """share of tokens that leave so"""


@torch.no_grad()
def gate_quality(
    loaded: LoadedModel, items: Sequence[Item], threshold: float = 0.95, batch_size: int = 64
) -> GateQuality:
    """All tokens run to the end at full width; gates read the states on the way."""
    model, first = loaded.model, loaded.min_exit_layer
    layers = range(first, model.config.num_layers)
    parts: list[tuple[Tensor, ...]] = []
    for places, tokens in batches(items, batch_size):
        chosen = [items[place] for place in places]
        rows = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(item.answer) for item in chosen]))
        where = torch.cat([torch.arange(item.first, len(item.inputs)) for item in chosen])
        answers = torch.tensor([token for item in chosen for token in item.answer], device=loaded.device)
        streams = residuals(model, tokens.to(loaded.device), full_plan(model.config), lambda run: run >= first)
        states = torch.stack([x[rows, where] for x in streams])
        losses = torch.stack([F.cross_entropy(model.logits(x[None])[0], answers, reduction="none") for x in states])
        outputs = torch.stack([loaded.require_gates().leaving(layer, x) for layer, x in zip(layers, states)])
        if loaded.reading.target == "divergence":
            wanted = model.divergences(states)
        else:
            wanted = loaded.reading.wanted(losses[:-1], losses[-1:])
        parts.append((outputs, wanted, losses[:-1], losses[-1:]))
    outputs, wanted, exits, final = (torch.cat(tensors, dim=1).double() for tensors in zip(*parts))
    passes = loaded.reading.confidence(outputs) > threshold
    leaves = passes.any(0)
    at = passes.int().argmax(0)
    extra = (exits.gather(0, at[None])[0] - final[0])[leaves]
    return GateQuality(
        squared_error=(loaded.reading.prediction(outputs) - wanted).square().mean().item(),
        variance=(wanted - wanted.mean(1, keepdim=True)).square().mean().item(),
        extra_loss=extra.mean().item() if extra.numel() else 0.0,
        leaving=leaves.double().mean().item(),
    )


def extra_loss(adaptive: Sequence[ItemResult], full: Sequence[ItemResult], num_layers: int) -> float:
    """Mean nats that answer tokens which leave lose to full width and depth, all tokens with their own exits."""
    lost = [
        loss - reference
        for one, whole in zip(adaptive, full, strict=True)
        for loss, reference, layer in zip(one.losses, whole.losses, one.answer_exits)
        if layer < num_layers
    ]
    return sum(lost) / len(lost) if lost else 0.0
