"""One DeepSpeed engine around one model: micro-steps and the guarded optimizer step."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.config.ds_config import bf16_enabled, offload_enabled, zero_stage
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.engine.experts import (
    expert_group_name,
    experts_apart,
    mark_expert_parameters,
    register_expert_groups,
)
from megatron_adamba.engine.frozen import FrozenMasters
from megatron_adamba.engine.gradients import all_finite, gradient_tensors
from megatron_adamba.engine.launch import RankInfo, import_deepspeed
from megatron_adamba.engine.mpu import ModelParallelUnit, mark_sharded_parameters
from megatron_adamba.engine.optimizer import ElasticOptimizer, parameter_groups
from megatron_adamba.layers.lesson import Lesson
from megatron_adamba.layers.moe.statistics import RouterStatistics
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.model.taps import TapRequest, Taps
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """global norm before clipping; nan where the step was skipped for not being finite"""
    skipped: bool
    """the loss or a gradient was not finite"""
    refused: bool = False
    """a rank said that its weights may not change (`ask_before_update`): nothing of the step counts"""


@dataclass(frozen=True)
class MicroStep:
    """One pass of one micro-batch."""

    tokens: Tensor
    """[batch, seq] int64, as labels"""
    labels: Tensor
    seq_idx: Tensor | None
    """[batch, seq] int32 document numbers"""
    plan: ElasticPlan
    taps: TapRequest | None = None
    """states to keep; over a pipeline all passes of a step ask for the same"""
    share: Tensor | None = None
    """scalar on the device: the micro-batch's scored tokens over the mean of the step's micro-batches; None is 1"""
    teaches: Lesson | None = None
    """to be filled by this pass, or"""
    learns: Lesson | None = None
    """to be read, from the micro-batch's full pass, which came before"""


@dataclass(frozen=True)
class StepReport:
    """A whole step."""

    result: StepResult
    losses: Tensor
    """[micro steps] of this rank's replica, routers' losses included, on every rank of it alike"""
    loads: dict[int, Tensor]
    """by block: choices that each expert got in this replica, [experts]"""
    taps: list[Taps]
    """of each micro-step that asked for some; over a pipeline on the rank with the head alone"""


class TrainingSession:
    """Runs a model under DeepSpeed. The model must have its final `requires_grad` flags.

    ds_config: complete (`config.ds_config.complete_ds_config`); topology: the one that the model was built for.
    """

    def __init__(
        self,
        model: AdambaModel,
        specs: tuple[ParamSpec, ...],
        optimizer: OptimizerConfig,
        ds_config: dict[str, Any],
        rank_info: RankInfo,
        topology: Topology,
    ) -> None:
        self.rank_info, self.specs, self.topology = rank_info, specs, topology
        self.stage, self.offload = zero_stage(ds_config), offload_enabled(ds_config)
        self.bf16 = bf16_enabled(ds_config)
        ns_dtype = torch.bfloat16 if self.bf16 else torch.float32
        apart = expert_group_name(topology) if experts_apart(topology) else None
        groups = self._parameter_groups(model, optimizer, apart)
        # ZeRO replaces the groups' parameters by flat partitions, so who belongs where is kept here
        self._group_of = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
        self.optimizer = ElasticOptimizer(groups, optimizer, ns_dtype, topology)
        if topology.size("tp") > 1:
            mark_sharded_parameters(model, specs)
        if apart is not None and model.config.num_experts:
            register_expert_groups(topology)
            mark_expert_parameters(model, specs, topology)
        self.frozen = FrozenMasters(model, specs, topology, self.bf16)
        self.engine = self._build_engine(model, ds_config)
        self.frozen.settle(self.module)
        self.micro_steps = ds_config["gradient_accumulation_steps"]
        self._done = 0
        self._losses_finite: bool | Tensor = True
        self._may_update: Callable[[], bool] = lambda: True

    def ask_before_update(self, may_update: Callable[[], bool]) -> None:
        """may_update: asked on every rank when a step's gradients are there; one no, and no rank steps."""
        self._may_update = may_update

    def _parameter_groups(self, model: AdambaModel, optimizer: OptimizerConfig, apart: str | None) -> list[dict]:
        return parameter_groups(model, self.specs, optimizer, apart)

    def _build_engine(self, model: AdambaModel, ds_config: dict[str, Any]):
        return _initialize(model, self.optimizer, ds_config, ModelParallelUnit(self.topology))

    @property
    def module(self) -> AdambaModel:
        return self.engine.module

    @property
    def defers(self) -> bool:
        """Whether gradients of nested weights are summed in place and handed over once a step."""
        return self.stage <= 1 and not self.offload

    def train_step(self, micro_steps: Iterable[MicroStep]) -> StepReport:
        """All micro-batches of a step, as many as the engine accumulates, and the optimizer's step."""
        losses, kept = [], []
        loads: dict[int, Tensor] = {}
        for one in micro_steps:
            statistics, taps = RouterStatistics(), None
            if one.taps is not None:
                taps = Taps(one.taps)
                kept.append(taps)
            losses.append(self.micro_step(**vars(one) | {"taps": taps}, statistics=statistics))
            for block, load in statistics.loads.items():
                loads[block] = loads.get(block, 0) + load
        return StepReport(self.step(), torch.stack(losses).float(), loads, kept)

    def position_losses(self, tokens: Tensor, labels: Tensor, seq_idx: Tensor | None, plan: ElasticPlan) -> Tensor:
        """Each position's loss, [batch, seq], without gradient, on every rank of the replica."""
        return self.engine(tokens=tokens, labels=labels, seq_idx=seq_idx, plan=plan, reduction="none")

    def micro_step(self, **inputs: Any) -> Tensor:
        """Forward and backward of one micro-batch; returns its loss, detached. `inputs` are the model's."""
        last = self._done == self.micro_steps - 1
        if not self.defers:
            mode = Accumulation.DIRECT
        else:
            mode = Accumulation.HAND_OVER if last else Accumulation.DEFER
        # blocks above the exit run on zero tokens wherever a gradient is expected of them
        loss = self.engine(**inputs, accumulation=mode, all_take_part=mode is not Accumulation.DEFER)
        self.engine.backward(loss)
        detached = loss.detach()
        self._losses_finite = torch.isfinite(detached) & self._losses_finite
        self._done += 1
        if not last:
            self.engine.step()
        return detached

    def step(self) -> StepResult:
        """The optimizer's step after the last micro-batch; left out on every rank when a loss or gradient of any of
        them is not finite."""
        assert self._done == self.micro_steps, "step comes after the last micro-batch"
        grads = gradient_tensors(self.engine)
        skipped, refused = self._agree(grads)
        norm = self._plain_norm(grads) if self.stage == 0 else None
        self.optimizer.skip_step = skipped or refused
        self.engine.step()
        self.optimizer.skip_step = False
        self._done, self._losses_finite = 0, True
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return StepResult(float("nan") if skipped else float(norm), skipped, refused)

    def _agree(self, grads: list[Tensor]) -> tuple[bool, bool]:
        """Whether a loss or gradient of this step is not finite on any rank of the job; whether any refuses to step."""
        finite = all_finite(grads, self.rank_info.device) & self._losses_finite
        flags = torch.stack([finite.float(), torch.full_like(finite, self._may_update(), dtype=torch.float32)])
        if self.rank_info.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        finite_everywhere, allowed = flags.tolist()
        return not finite_everywhere, not allowed

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer group of a trainable parameter."""
        return self.optimizer.param_groups[self._group_of[id(parameter)]]

    def set_learning_rates(self, factor: float) -> None:
        """lr = peak * factor in every group."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average a small tensor over the data-parallel ranks."""
        value = value.clone()
        if self.topology.size("dp") > 1:
            dist.all_reduce(value, group=self.topology.group("dp"))
            value /= self.topology.size("dp")
        return value

    def any_rank(self, marks: list[bool]) -> list[bool]:
        """Whether each mark is set on any rank of the job."""
        flags = torch.tensor(marks, dtype=torch.float32, device=self.rank_info.device)
        if self.rank_info.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return (flags > 0).tolist()

    @staticmethod
    def _plain_norm(grads: list[Tensor]) -> float:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item() if grads else 0.0


def _initialize(model: nn.Module, optimizer: ElasticOptimizer, ds_config: dict[str, Any], mpu: ModelParallelUnit):
    """DeepSpeed's engine; what it prints while it is made goes to this rank's log."""
    with contextlib.redirect_stdout(io.StringIO()) as chatter:
        engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
    logging.getLogger("megatron_adamba").info("DeepSpeed: %s", " | ".join(chatter.getvalue().split("\n")))
    return engine
