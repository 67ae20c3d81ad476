"""ElasticPlan: which slice of every layer runs, and where the model is left. An argument, never state of a module."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_adamba.blueprint.nest import largest_widths
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import ConfigError


@dataclass(frozen=True)
class MixedExits:
    """Tokens that leave before the others do, at random positions. Later blocks find their keys, values and Mamba
    inputs computed from the residual that they left with, as where gates let them go; a model that has only seen whole
    sequences leave does not know what to make of those (mixed training of Elbayad et al., arXiv 1910.10073, with two
    layers to a pass)."""

    layer: int
    """blocks that run for them"""
    share: float
    """of the positions"""
    key: int
    """of the random positions"""

    def positions(self, length: int, device: torch.device) -> Tensor:
        """[length] bool: who leaves. The same in all sequences of a batch, and whatever the layout."""
        generator = np.random.Generator(np.random.Philox(key=self.key))
        return torch.from_numpy(generator.random(length) < self.share).to(device)


@dataclass(frozen=True)
class ElasticPlan:
    """One width per block and the number of blocks that run."""

    widths: tuple[int, ...]
    """per block, one of the nest's widths, or the block's own largest where that is less; a Mamba mixer ignores it, its
    block's MLP does not"""
    exit_layer: int
    """blocks that run; the final norm and the head read the residual behind them"""
    mixed: MixedExits | None = None
    """tokens that leave earlier"""

    @property
    def whole_depth(self) -> bool:
        """Whether all tokens run through all blocks."""
        return self.exit_layer == len(self.widths) and self.mixed is None

    @property
    def label(self) -> str:
        """Short name for logs: the width where all layers share it, else their range."""
        low, high = min(self.widths), max(self.widths)
        width = str(low) if low == high else f"{low}..{high}"
        if self.mixed is not None:
            return f"{width}@{self.mixed.layer}|{self.exit_layer}"
        return width if self.exit_layer == len(self.widths) else f"{width}@{self.exit_layer}"


def uniform_plan(config: ResolvedModel, width: int, exit_layer: int | None = None) -> ElasticPlan:
    """The same width in every block. Raises ConfigError for a width that is not in the nest."""
    widths = [row.width for row in config.nest]
    if width not in widths:
        near = min(widths, key=lambda known: abs(known - width))
        raise ConfigError(f"width {width}: not in this model's nest {widths}; try {near}")
    return ElasticPlan((width,) * config.num_layers, config.num_layers if exit_layer is None else exit_layer)


def full_plan(config: ResolvedModel) -> ElasticPlan:
    """Every block at its own largest width, to the last block."""
    return ElasticPlan(tuple(largest_widths(config)), config.num_layers)
