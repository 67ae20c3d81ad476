"""A larger tensor around an old one: where the old values lie, and what fills the places between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from megatron_adamba.blueprint.growth import AxisGrowth
from megatron_adamba.model.init import name_generator

_BLOCK = 1 << 22
"""elements of noise that are made at a time: what is between fp32 and the tensor's own dtype stays small"""


def copy_kept(new: Tensor, old: Tensor, axes: Sequence[AxisGrowth]) -> None:
    """The old values to their new places."""
    for places in product(*(axis.kept() for axis in axes)):
        new[tuple(target for _, target in places)] = old[tuple(source for source, _ in places)]


def silence(new: Tensor, rows: Sequence[slice], columns: Sequence[slice]) -> None:
    """Zeros where these rows and columns of the last two axes meet; of a vector only rows are given."""
    for row in rows:
        if new.dim() == 1:
            new[row] = 0
        for column in columns:
            new[..., row, column] = 0


def fill_low_rank(new: Tensor, rank: int, std: float, seed: int, name: str) -> None:
    """A @ B in the last two axes, A [rows, rank] of standard deviation `std`, B [rank, columns] standard normal
    (arXiv 2106.09685, section 4.1, with both factors random). Each matrix of a stack has factors of its own."""
    if new.dim() > 2:
        for index, part in enumerate(new):
            fill_low_rank(part, rank, std, seed, f"{name}/{index}")
        return
    generator = name_generator(seed, f"{name}/grown")
    rows, columns = new.shape
    left = torch.randn(rows, rank, generator=generator).mul_(std)
    right = torch.randn(rank, columns, generator=generator)
    step = max(_BLOCK // max(columns, 1), 1)
    for start in range(0, rows, step):
        new[start : start + step] = left[start : start + step] @ right
