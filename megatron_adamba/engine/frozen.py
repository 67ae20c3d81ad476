"""Frozen weights: what of them a rank holds, and their fp32 values in a bf16 run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.parallel.topology import Topology


def frozen_piece(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's elements, flat, and the first one's place; all of them where ZeRO 3 does not partition."""
    if hasattr(parameter, "ds_tensor"):
        held: Any = parameter
        flat = held.ds_tensor.detach().view(-1)
        start = held.ds_tensor.numel() * dist.get_rank(held.ds_process_group)
        return flat[: max(0, held.ds_numel - start)], start
    return parameter.detach().view(-1), 0


def saves(spec: ParamSpec, partitioned: bool, topology: Topology) -> bool:
    """Whether this rank writes what it holds of a parameter: of several ranks that hold the same, the first one does.

    Shards and ZeRO's partitions are held once. What tensor parallelism leaves whole lies on all of its ranks, and
    what ZeRO does not partition on all data-parallel ranks.
    """
    copied = spec.unit is None and topology.place("tp") > 0
    replica = topology.place("edp" if spec.group == "expert" else "dp")
    return not copied and (partitioned or replica == 0)


class FrozenMasters:
    """fp32 in host memory of frozen weights that bf16 would round, so that checkpoints hold them as they were read.

    A model published in bf16 costs nothing here, nor does an fp32 run. Only ranks that save an element hold it.
    """

    def __init__(self, model: nn.Module, specs: Sequence[ParamSpec], topology: Topology, bf16: bool) -> None:
        """Before the engine casts the model, whose fp32 storage is kept instead of a copy."""
        self._topology, self._specs, self._bf16 = topology, {spec.name: spec for spec in specs}, bf16
        frozen = {name: parameter.detach() for name, parameter in _frozen(model)} if bf16 else {}
        self._held = {name: frozen[name] for name in self._rounded(frozen)}

    def _rounded(self, frozen: dict[str, Tensor]) -> list[str]:
        """Names of parameters of which any rank would lose something; all ranks agree."""
        if not self._bf16:
            return []
        marks = torch.tensor([name in frozen and not _exact(frozen[name]) for name in self._specs]).float()
        # over the ranks of this pipeline stage, which hold shards of the same parameters
        for kind in ("tp", "dp"):
            if self._topology.size(kind) > 1:
                marks = marks.to(next(iter(frozen.values())).device) if frozen else marks
                dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self._topology.group(kind))
        return [name for name, mark in zip(self._specs, marks.tolist()) if mark and name in frozen]

    def settle(self, model: nn.Module) -> None:
        """When the engine has cast and partitioned the model: keep this rank's elements alone."""
        for name, parameter in _frozen(model):
            whole = self._held.pop(name, None)
            flat, start = frozen_piece(parameter)
            if whole is not None and self._saves(name, parameter) and flat.numel():
                mine = whole.view(-1)[start : start + flat.numel()].cpu()
                self._held[name] = mine if mine.numel() == whole.numel() else mine.clone()

    def _saves(self, name: str, parameter: nn.Parameter) -> bool:
        return saves(self._specs[name], hasattr(parameter, "ds_tensor"), self._topology)

    def piece(self, name: str, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """`frozen_piece`, in fp32 where the parameter itself is rounded and this rank saves it."""
        flat, start = frozen_piece(parameter)
        return self._held.get(name, flat), start

    def make_room(self, model: nn.Module, in_fp32: set[str]) -> None:
        """Before a checkpoint is loaded which holds the named parameters in fp32."""
        self._held.clear()
        for name, parameter in _frozen(model):
            flat, _ = frozen_piece(parameter)
            if self._bf16 and name in in_fp32 and flat.numel() and self._saves(name, parameter):
                self._held[name] = torch.empty(flat.shape, dtype=torch.float32)

    def refresh(self, model: nn.Module) -> None:
        """Behind it: the model's own weights from these."""
        for name, parameter in _frozen(model):
            if name in self._held:
                frozen_piece(parameter)[0].copy_(self._held[name])


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _exact(data: Tensor) -> bool:
    """Whether bf16 holds every value."""
    return torch.equal(data.to(torch.bfloat16).to(data.dtype), data)
