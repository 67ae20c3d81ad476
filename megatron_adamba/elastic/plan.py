"""ElasticPlan: which slice of every layer runs, and where the model is left. An argument, never state of a module."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adamba.blueprint.nest import largest_widths
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.errors import ConfigError


@dataclass(frozen=True)
class ElasticPlan:
    """One width per block and the number of blocks that run."""

    widths: tuple[int, ...]
    """per block, one of the nest's widths, or the block's own largest where that is less; a Mamba mixer ignores it, its
    block's MLP does not"""
    exit_layer: int
    """blocks that run; the final norm and the head read the residual behind them"""

    @property
    def label(self) -> str:
        """Short name for logs: the width where all layers share it, else their range."""
        low, high = min(self.widths), max(self.widths)
        width = str(low) if low == high else f"{low}..{high}"
        return width if self.exit_layer == len(self.widths) else f"{width}@{self.exit_layer}"


def uniform_plan(config: ModelConfig, width: int, exit_layer: int | None = None) -> ElasticPlan:
    """The same width in every block. Raises ConfigError for a width that is not in the nest."""
    widths = [row.width for row in config.nest]
    if width not in widths:
        near = min(widths, key=lambda known: abs(known - width))
        raise ConfigError(f"width {width}: not in this model's nest {widths}; try {near}")
    return ElasticPlan((width,) * config.num_layers, config.num_layers if exit_layer is None else exit_layer)


def full_plan(config: ModelConfig) -> ElasticPlan:
    """Every block at its own largest width, to the last block."""
    return ElasticPlan(tuple(largest_widths(config)), config.num_layers)
