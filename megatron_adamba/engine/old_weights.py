"""Phase 3: what was there before the model was made wider trains more slowly than what is new."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from megatron_adamba.blueprint.growth import AxisGrowth, before_expansion, growth_of
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.engine.session import TrainingSession
from megatron_adamba.engine.state import trained_piece


def slow_old_weights(session: TrainingSession, config: ResolvedModel, factor: float) -> None:
    """Every update of an old weight counts `factor` from now on, element by element, as one matrix holds both kinds.

    config: resolved, of a model that was made wider. Memory: one byte an element that this rank's optimizer holds, and
    in a step a copy of those.
    """
    old = before_expansion(config)
    assert old is not None, "checked when the run was planned"
    growth = growth_of(old, config)
    specs = {spec.name: spec for spec in session.specs}
    masks: dict[Tensor, Tensor] = {}
    for name, parameter in session.module.named_parameters():
        piece = trained_piece(session, parameter) if parameter.requires_grad else None
        if piece is None:
            continue
        mask = masks.setdefault(piece.flat, torch.zeros_like(piece.flat, dtype=torch.bool))
        own = session.module.share(specs[name], old_places(specs[name].shape, growth[name])).flatten()
        piece.of(mask).copy_(own[piece.start : piece.start + piece.numel])
    session.optimizer.slow_down(masks, factor)


def old_places(shape: tuple[int, ...], axes: tuple[AxisGrowth, ...]) -> Tensor:
    """True where a canonical tensor of the wider model holds a value of the old one."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for places in product(*(axis.kept() for axis in axes)):
        mask[tuple(target for _, target in places)] = True
    return mask
