"""What every layer of one forward pass shares; made by the model, never kept on a module."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_adamba.layers.moe.statistics import RouterStatistics
from megatron_adamba.ops.nested_linear import Accumulation


@dataclass(frozen=True)
class ForwardContext:
    """Shared inputs of the blocks in one forward pass."""

    accumulation: Accumulation
    """what backward does with the gradients of nested weights"""
    cos: Tensor
    """[seq, head_dim / 2], rotary table of the positions at hand"""
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    """per window size: [1 or batch, 1, seq, keys] bool, or None for plain causality"""
    seq_idx: Tensor | None
    """[batch, seq] int32 document numbers, None where each row is one document"""
    length: int = 0
    """tokens of the whole sequence, those left out that lengthen it to what ranks can share; E blocks read it"""
    statistics: RouterStatistics = field(default_factory=RouterStatistics)
    """what routers leave behind"""
