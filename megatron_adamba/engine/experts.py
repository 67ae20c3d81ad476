"""What DeepSpeed has to know of experts that other ranks hold: groups, markers, optimizer groups."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.engine.markers import mark
from megatron_adamba.layers.moe.layer import MoE
from megatron_adamba.parallel.topology import Topology


def experts_apart(topology: Topology) -> bool:
    """Whether experts are summed up over other ranks than the rest of the model: where they are shared out, and where
    tensor-parallel ranks route tokens of their own."""
    return topology.size("ep") > 1 or topology.size("tp") > 1


def expert_group_name(topology: Topology) -> str:
    """DeepSpeed's name for the groups of a degree of expert parallelism."""
    return f"ep_size_{topology.size('ep')}"


def moe_layer_for(topology: Topology, experts_train: bool) -> type[MoE]:
    """What the model has to build its mixtures of experts from.

    DeepSpeed 0.19.8 looks for modules of its own class to find out that a model has experts, lets no other run under
    ZeRO 3, and where it finds one insists on experts that train.
    """
    if not experts_apart(topology) or not experts_train:
        return MoE
    marker: Any = importlib.import_module("deepspeed.module_inject.auto_ep_layer").AutoEPMoELayer

    class MarkedMoE(MoE, marker):
        """Our layer under DeepSpeed's class; what that class would set up is set up already."""

        def set_deepspeed_parallelism(self, *_args: object, **_options: object) -> None:
            pass

    return MarkedMoE


def register_expert_groups(topology: Topology) -> None:
    """Hand DeepSpeed the groups, which its own maker would let span tensor-parallel ranks that see the same tokens."""
    groups = importlib.import_module("deepspeed.utils.groups")
    name = expert_group_name(topology)
    for kind, held, ranks in (
        ("ep", groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS),
        ("edp", groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
    ):
        held[name] = topology.group(kind)
        ranks[name] = next(group for group in topology.grid.groups(kind) if topology.rank in group)


def mark_expert_parameters(module: nn.Module, specs: tuple[ParamSpec, ...], topology: Topology) -> None:
    """Attributes that DeepSpeed reads: gradients are summed, and ZeRO partitions, over the edp group."""
    parameters = dict(module.named_parameters())
    for spec in specs:
        if spec.group == "expert":
            mark_expert(parameters[spec.name], topology)


def mark_expert(parameter: nn.Parameter, topology: Topology) -> None:
    name = expert_group_name(topology)
    mark(
        parameter,
        allreduce=False,
        group_name=name,
        ds_zero_placement_family="autoep_expert",
        ds_zero_partition_group_name=name,
        ds_zero_partition_process_group=topology.group("edp"),
    )
    if topology.size("tp") > 1:
        mark(parameter, tensor_model_parallel=True)
