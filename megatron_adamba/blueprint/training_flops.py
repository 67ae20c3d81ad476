"""Floating-point operations of a token in training: forward, and what of the backward pass is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_adamba.blueprint.flops import Work, block_work
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows
from megatron_adamba.config.resolved import ResolvedModel


@dataclass(frozen=True)
class TrainingCosts:
    """Forward + backward FLOPs per token; recomputation and the gates' own steps are not counted."""

    blocks: tuple[dict[int, int], ...]
    """of each block, by its width"""
    head: tuple[int, ...]
    """[num_layers + 1], behind so many blocks"""
    lesson: int
    """what a pass that learns from another one adds: that one's logits, made again"""

    def of(self, widths: Sequence[int], exit_layer: int | None = None) -> int:
        """Of a token of the whole model. widths: one of the nest's per block; exit_layer: blocks that run (None: all of
        them)."""
        depth = len(self.blocks) if exit_layer is None else exit_layer
        return sum(block[width] for block, width in zip(self.blocks[:depth], widths)) + self.head[depth]


def training_costs(config: ResolvedModel, seq_len: int, frozen: Collection[str] = ()) -> TrainingCosts:
    """frozen: names of parameters that do not train.

    A product with a weight costs as much again for the weight's gradient, where that trains, and as much again for its
    input's, where anything in front of it trains. A product of activations costs twice as much again where one of them
    needs a gradient. With nothing frozen that makes three times the forward pass.
    """
    trained = [spec.name for spec in manifest(config) if spec.name not in frozen]
    trains = lambda module: any(name.startswith(f"{module}.") for name in trained)
    rows, windows = block_rows(config), attention_windows(config)
    table = "embedding" if config.tie_embeddings else "head"
    ends = [(Work("final_norm", 0),), (Work(table, 2 * config.hidden_size * config.vocab_size),)]
    trained_ends = [part for part in ("final_norm", table) if trains(part)]
    # whether the residual stream needs a gradient
    reached = trains("embedding")
    blocks, head = [], [_cost(ends, trained_ends, reached)]
    for index, letter in enumerate(config.block_pattern):
        steps = {width: block_work(config, letter, row, windows[index], seq_len) for width, row in rows[index].items()}
        parts = {work.part for step in steps[config.widths[0]] for work in step if work.part}
        own = [part for part in parts if trains(f"blocks.{index}.{part}")]
        blocks.append({width: _cost(of_width, own, reached) for width, of_width in steps.items()})
        reached = reached or bool(own)
        head.append(_cost(ends, trained_ends, reached))
    return TrainingCosts(tuple(blocks), tuple(head), 2 * config.hidden_size * config.vocab_size)


def _cost(steps: Sequence[tuple[Work, ...]], trained: Collection[str], reached: bool) -> int:
    """trained: parts that have a parameter that does; reached: whether the input needs a gradient."""
    total = 0
    for step in steps:
        for work in step:
            other = reached if work.part is None else work.part in trained
            total += work.flops * (1 + reached + other)
        reached = reached or any(work.part in trained for work in step)
    return total
