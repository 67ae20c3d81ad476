"""The view of a topology that DeepSpeed asks for."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.engine.markers import mark
from megatron_adamba.parallel.topology import Topology


class ModelParallelUnit:
    """The methods that DeepSpeed 0.19.8 calls; `model` is tp x pp."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.group("dp")

    def get_data_parallel_rank(self) -> int:
        return self._topology.place("dp")

    def get_data_parallel_world_size(self) -> int:
        return self._topology.size("dp")

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.group("model")

    def get_model_parallel_rank(self) -> int:
        return self._topology.place("model")

    def get_model_parallel_world_size(self) -> int:
        return self._topology.size("model")

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.group("tp")

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.place("tp")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.size("tp")

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.group("pp")

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._topology.place("pp")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._topology.size("pp")


def mark_sharded_parameters(module: nn.Module, specs: tuple[ParamSpec, ...]) -> None:
    """Tell DeepSpeed which gradients to sum over the model-parallel ranks for the global norm: those of shards. It
    counts the others, which every rank holds alike, once."""
    parameters = dict(module.named_parameters())
    for spec in specs:
        if spec.unit not in (None, "expert"):
            mark(parameters[spec.name], tensor_model_parallel=True)
