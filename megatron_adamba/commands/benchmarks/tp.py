"""Layers shared out over two ranks, their units dealt out in turn, beside the same layers split into halves.

Both sides are this project's layers with the same collectives; they differ in who owns which unit. In halves rank 0 has
the first KV groups and FFN blocks, so at half the width and below rank 1 has nothing to do but wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import (
    DTYPES,
    TOLERANCE,
    ComparisonError,
    Row,
    gradient_of,
    interleaved,
    require_close,
    time_row,
)
from megatron_adamba.commands.benchmarks.ranks import PATIENCE, on_ranks
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.attention import NestedAttention
from megatron_adamba.layers.block import AttentionBlock
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.mlp import NestedMLP
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.ops.host_memory import keep_freed_pages
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.rotary import rotary_table
from megatron_adamba.parallel.layout import cut
from megatron_adamba.parallel.tensor import ALONE, TensorParallel

RANKS = 2


@dataclass(frozen=True)
class Halves(TensorParallel):
    """Rank r owns one run of `units` units."""

    units: int = 0
    """of the layer at full width: which of the first n are a rank's own depends on how many there are"""

    @property
    def run(self) -> tuple[int, int]:
        """First unit of this rank and one past its last."""
        return self.rank * self.units // self.size, (self.rank + 1) * self.units // self.size

    def owned(self, units: int) -> int:
        first, end = self.run
        return min(max(units - first, 0), end - first)


class Stack(nn.Module):
    """Attention blocks one behind the other, as they lie in a model."""

    def __init__(self, config: ResolvedModel, tp: TensorParallel, halves: bool = False) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(AttentionBlock(config, None, tp) for _ in range(config.num_layers))
        if halves:
            place = (tp.size, tp.rank, tp.group, tp.sequence_parallel)
            for block in self.blocks:
                block.attention = NestedAttention(config, None, Halves(*place, units=config.num_kv_groups))
                block.mlp = NestedMLP(config, Halves(*place, units=config.ffn_size // config.ffn_granule))

    def forward(self, x: Tensor, row: NestRow, accumulation: Accumulation) -> Tensor:
        """x: [batch, seq, hidden_size] -> the same shape."""
        config = self.config
        cos, sin = rotary_table(torch.arange(x.shape[1]), config.head_dim, config.rope_theta, config.rope_sign)
        for block in self.blocks:
            x = block(x, row, ForwardContext(accumulation, cos, sin, {None: None}, None))
        return x


def measure(quick: bool) -> list[Row]:
    """Rows for every dtype and width, timed on ranks that share the machine's threads."""
    return on_ranks(_measure_rank, RANKS, quick, max(1, torch.get_num_threads() // RANKS))


def _measure_rank(rank: int, store: str, quick: bool, threads: int) -> list[Row]:
    dist.init_process_group("gloo", f"file://{store}", PATIENCE, RANKS, rank)
    return _measure(TensorParallel(RANKS, rank, dist.group.WORLD), quick, threads)


def _measure(tp: TensorParallel, quick: bool, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    keep_freed_pages()
    hidden, batch, seq, repeats = (64, 1, 16, 2) if quick else (1024, 1, 512, 7)
    config = resolve_model(
        ModelConfig(
            hidden_size=hidden,
            num_layers=2,
            vocab_size=8,
            head_dim=hidden // 16,
            num_kv_groups=8,
            ffn_granule=4 if quick else 64,
            widths=[hidden // 8, hidden // 4, hidden // 2, hidden],
        )
    )
    rows = []
    for name, dtype in DTYPES.items():
        whole = Stack(config, ALONE)
        sides = {"ours": Stack(config, tp), "peer": Stack(config, tp, halves=True)}
        _fill(config, whole, sides, tp)
        for model in (whole, *sides.values()):
            model.to(dtype)
        for row in config.nest:
            x = torch.randn(batch, seq, hidden, generator=torch.Generator().manual_seed(row.width)).to(dtype)
            what = f"{name} width {row.width}, dealt in turn vs in halves"
            _compare(what, whole, sides, x, row)
            calls = {side: lambda model=model, x=x, row=row: _step(model, x, row) for side, model in sides.items()}
            times = interleaved(calls, repeats, warmup=1)
            rows.append(time_row(what, times["ours"], times["peer"]))
    return rows


@torch.no_grad()
def _fill(config: ResolvedModel, whole: Stack, sides: dict[str, Stack], tp: TensorParallel) -> None:
    """The same weights for all; output projections away from their zeros at birth, which would hide the rest."""
    for spec in manifest(config):
        if not spec.name.startswith("blocks."):
            continue
        values = initial_tensor(spec, 0)
        if spec.init == "output":
            values.normal_(std=spec.shape[1] ** -0.5, generator=torch.Generator().manual_seed(1))
        whole.get_parameter(spec.name).copy_(values)
        sides["ours"].get_parameter(spec.name).copy_(cut(spec, values, tp.size, tp.rank))
        sides["peer"].get_parameter(spec.name).copy_(_cut_in_halves(spec, values, tp))


def _cut_in_halves(spec: ParamSpec, values: Tensor, tp: TensorParallel) -> Tensor:
    if spec.unit_axis is None:
        return values
    ((length, unit),) = spec.parts
    first, end = Halves(tp.size, tp.rank, units=length // unit).run
    return values.narrow(spec.unit_axis, first * unit, (end - first) * unit)


def _step(model: Stack, x: Tensor, row: NestRow) -> tuple[Tensor, Tensor]:
    """Forward and backward of an inner micro-batch, ended together; the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    y = model(x, row, Accumulation.DEFER)
    y.float().square().mean().backward()
    dist.barrier()
    return y.detach(), gradient_of(x)


def _compare(what: str, whole: Stack, sides: dict[str, Stack], x: Tensor, row: NestRow) -> None:
    """Both sides with the layers on one rank. Every rank hears of a difference on any, so that all stop."""
    wanted = _step(whole, x, row)
    mine = None
    for side, model in sides.items():
        for part, got, want in zip(("output", "input gradient"), _step(model, x, row), wanted):
            # channels past the width pass by untouched and would hide what the layers did
            prefix = (..., slice(0, row.width))
            try:
                require_close(
                    f"{what}, {part} of {side} beside one rank", got[prefix], want[prefix], TOLERANCE[x.dtype]
                )
            except ComparisonError as error:
                mine = mine or str(error)
    problems: list[str | None] = [None] * RANKS
    dist.all_gather_object(problems, mine)
    for problem in problems:
        if problem is not None:
            raise ComparisonError(problem)
