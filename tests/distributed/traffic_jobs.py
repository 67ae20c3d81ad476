"""A job that records what a model's forward and backward really hand to torch.distributed's collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.parallel.tensor import TensorParallel

HANDED_IN = {
    "c10d::allreduce_": ("all_reduce", lambda arguments: arguments[0][0]),
    "c10d::_allgather_base_": ("all_gather", lambda arguments: arguments[1]),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda arguments: arguments[1]),
}
"""torch's operators, below every function that starts a collective: their kind and what a rank hands in"""


class Issued(TorchDispatchMode):
    """Every collective that is issued while the mode is on: [kind, bytes], in order; unknown ones by their own name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            kind, tensor = HANDED_IN.get(function._schema.name, (None, None))
            if kind is None:
                self.calls.append([function._schema.name, -1])
            else:
                handed = tensor(args)
                self.calls.append([kind, handed.numel() * handed.element_size()])
        return function(*args, **(kwargs or {}))


def issued(
    info,
    model: dict[str, Any],
    sp: bool,
    dtype: str,
    batch: int,
    seq: int,
    plans: Sequence[Any],
    recompute: bool = False,
    all_take_part: bool = True,
) -> list[list[list[Any]]]:
    """A job: the calls of one micro-batch for each plan, (widths, exit layer)."""
    tp = TensorParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, sp)
    config = resolve_model(ModelConfig(**model))
    shard = AdambaModel(config, activation_checkpointing=recompute, tp=tp).initialize(0).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, config.vocab_size, (2, batch, seq), generator=generator)
    found = []
    for widths, exit_layer in plans:
        with Issued() as mode:
            plan = ElasticPlan(tuple(widths), exit_layer)
            shard(tokens, labels, plan=plan, all_take_part=all_take_part).backward()
        found.append(mode.calls)
    return found
