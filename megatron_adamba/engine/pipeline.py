"""Pipeline parallelism: chunks of the model as a DeepSpeed PipelineModule, run by 1F1B or DualPipeV."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.stages import StagePlan
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.engine.experts import mark_expert
from megatron_adamba.engine.gradients import gradient_tensors
from megatron_adamba.engine.markers import mark
from megatron_adamba.engine.optimizer import parameter_groups
from megatron_adamba.engine.session import MicroStep, StepReport, StepResult, TrainingSession
from megatron_adamba.layers.moe.statistics import RouterStatistics
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.model.taps import Taps
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.parallel.topology import ENDS


class _Carry(torch.autograd.Function):
    """x as it is; on the way back `loss` gets the gradient `scale`, and each of `idle` zeros.

    One float tensor travels between stages, so a stage's own losses start their backward where that of the stream
    passes. With idle parameters a stage whose own are all frozen takes part in backward, and DeepSpeed, which expects
    a gradient of every optimizer group, finds one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float, *idle: Tensor) -> Tensor:
        ctx.grads = (torch.full_like(loss, scale), None, *(torch.zeros_like(parameter) for parameter in idle))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *ctx.grads


class ChunkRunner:
    """What this rank does with each pass of each micro-batch: plans and data are known to every stage beforehand, and a
    schedule brings the passes to every chunk in their order."""

    def __init__(
        self, model: AdambaModel, stages: StagePlan, pp_rank: int, defers: bool, idle: Sequence[nn.Parameter]
    ) -> None:
        """idle: parameters that take part in every pass with a gradient of zero, one at least."""
        self.model, self.defers, self.idle = model, defers, idle
        self.chunks = {number: stages.chunks[number] for number in stages.numbers_of(pp_rank)}
        self.micro_steps: list[MicroStep] = []
        self.forwards: dict[int, int] = {}
        self.losses = torch.zeros(0)
        """[micro steps] what this rank's chunks add to each loss"""
        self.loads: dict[int, Tensor] = {}
        self.taps: list[Taps] = []

    def begin(self, micro_steps: list[MicroStep]) -> None:
        self.micro_steps, self.loads, self.taps = micro_steps, {}, []
        self.forwards = dict.fromkeys(self.chunks, 0)
        self.losses = torch.zeros(len(micro_steps), device=self.idle[0].device)

    def run(self, number: int, x: Tensor) -> Tensor:
        """The next pass through a chunk: [batch, seq, hidden_size] in and out, a scalar loss behind the head. The
        engine's own input of the first chunk stands for nothing."""
        index = self.forwards[number]
        self.forwards[number] += 1
        one, chunk, statistics = self.micro_steps[index], self.chunks[number], RouterStatistics()
        mode = Accumulation.DIRECT
        if self.defers:
            mode = Accumulation.HAND_OVER if index == len(self.micro_steps) - 1 else Accumulation.DEFER
        context = self.model.training_context(one.tokens, one.seq_idx, mode, statistics)
        taps = None if one.taps is None else Taps(one.taps)
        if taps is not None and not chunk.embedding:
            x = taps.unpack(x)
        all_take_part = mode is not Accumulation.DEFER
        out = self.model.run_chunk(
            chunk,
            x,
            one.tokens,
            one.labels,
            context,
            one.plan,
            all_take_part,
            taps=taps,
            teaches=one.teaches,
            learns=one.learns,
        )
        own = torch.as_tensor(statistics.total(), device=out.device)
        for block, load in statistics.loads.items():
            self.loads[block] = self.loads.get(block, 0) + load
        self.losses[index] += own.detach().float()
        if chunk.head:
            out = out if one.share is None else out * one.share
            self.losses[index] += out.detach().float()
            if taps is not None:
                self.taps.append(taps)
            return _Carry.apply(out + own, own.detach(), 0.0, *self.idle)
        if taps is not None:
            out = taps.pack(out)
        return _Carry.apply(out, own, 1 / len(self.micro_steps), *self.idle)


class _StagesMixin(nn.Module):
    """What our pipeline modules add to DeepSpeed's: the model below one name, and weights that two stages hold."""

    def hold(
        self,
        model: AdambaModel,
        fillers: nn.ParameterList,
        tied_group: dist.ProcessGroup | None,
        before_step: Callable[[], None],
    ) -> None:
        self.model, self.fillers = model, fillers
        self.tied_group, self.before_step = tied_group, before_step
        for parameter in self.parameters():
            # read by DeepSpeed's gradient norm, which counts a weight that two stages hold once
            mark(parameter, ds_pipe_replicated=False)
        if tied_group is not None and not any(chunk.embedding for chunk in model.chunks):
            mark(model.embedding.weight, ds_pipe_replicated=True)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        if self.tied_group is None or not self.model.embedding.weight.requires_grad:
            return []
        return [(self.model.embedding.weight, self.tied_group)]


def _deepspeeds(name: str) -> Any:
    """A module of DeepSpeed, which is imported when a session is made and not before."""
    return importlib.import_module(f"deepspeed.runtime.{name}")


def _classes(folded: bool) -> tuple[type, type]:
    """Module and engine: one chunk to a rank, or folded, two to a rank, one from each end."""
    schedule, plain = _deepspeeds("pipe.schedule"), _deepspeeds("pipe.engine").PipelineEngine
    module: Any = _deepspeeds("pipe.module").PipelineModule
    base: Any = plain
    if folded:
        module, base = _deepspeeds("pipe.dualpipev").DualPipeVModule, _deepspeeds("pipe.dualpipev").DualPipeVEngine

    class Stages(_StagesMixin, module):
        """This rank's chunks."""

    class GuardedEngine(base):
        """Calls `before_step` of its module right before the optimizer's step."""

        def _exec_guarded_step(self, *args: Any) -> None:
            self.module.before_step()
            self._exec_optimizer_step(*args)

        _INSTRUCTION_MAP: ClassVar = {**base._INSTRUCTION_MAP, schedule.OptimizerStep: _exec_guarded_step}

    return Stages, GuardedEngine


class PipelineSession(TrainingSession):
    """A session whose ranks hold chunks of the model; `model` was built with those of this rank."""

    def __init__(self, model: AdambaModel, *args: Any, stages: StagePlan, elsewhere: Sequence[ParamSpec]) -> None:
        """elsewhere: what other stages train and this one does not hold. Everything else as in `TrainingSession`."""
        self.stages, self._elsewhere = stages, elsewhere
        self._agreed = False, False
        """of the last step: not finite, refused"""
        self._fillers = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(9))
        super().__init__(model, *args)

    def _build_engine(self, model: AdambaModel, ds_config: dict[str, Any]) -> Any:
        topology, stages = self.topology, self.stages
        idle = [parameter for parameter in self._fillers if parameter.requires_grad]
        self.runner = ChunkRunner(model, stages, topology.place("pp"), self.defers, idle)
        layers = [partial(self.runner.run, number) for number in range(stages.num_chunks)]
        folded = stages.schedule != "1f1b"
        # each tensor-parallel rank sends a part of the stream where all hold the same
        part = topology.size("tp") > 1 and not topology.sequence_parallel and not folded
        ds_config = ds_config | {"pipeline": {"pipe_partitioned": part, "grad_partitioned": part}}
        ranks = _deepspeeds("pipe.topology").PipeModelDataParallelTopology(
            topology.size("pp"), topology.size("tp"), topology.size("dp")
        )
        make_module, make_engine = _classes(folded)
        with contextlib.redirect_stdout(io.StringIO()) as chatter:
            module = make_module(layers, topology=ranks, partition_method="uniform")
            module.hold(model, self._fillers, self._tied_group(model), self._before_step)
            mpu = module.mpu()
            engine = make_engine(
                args=None,
                model=module,
                optimizer=self.optimizer,
                mpu=mpu,
                config=ds_config,
                config_class=_deepspeeds("config").DeepSpeedConfig(ds_config, mpu),
            )
        logging.getLogger("megatron_adamba").info("DeepSpeed: %s", " | ".join(chatter.getvalue().split("\n")))
        return engine

    def _parameter_groups(self, model: AdambaModel, optimizer: OptimizerConfig, apart: str | None) -> list[dict]:
        """On every stage the same number, or DeepSpeed's stages wait for each other for good."""
        groups = parameter_groups(model, self.specs, optimizer, apart, self._elsewhere, list(self._fillers))
        used = {id(parameter): group["moe"] for group in groups for parameter in group["params"]}
        for filler in self._fillers[:-1]:
            filler.requires_grad_(id(filler) in used)
            # DeepSpeed knows groups of experts on stages that have some
            if used.get(id(filler)) and any(spec.group == "expert" for spec in self.specs):
                mark_expert(filler, self.topology)
        return groups

    def _tied_group(self, model: AdambaModel) -> dist.ProcessGroup | None:
        """First and last stage, where these are two and both hold the embedding."""
        tied = model.config.tie_embeddings and model.holds("embedding.weight")
        return self.topology.group(ENDS) if tied and self.stages.loss_rank > 0 else None

    @property
    def module(self) -> AdambaModel:
        return self.engine.module.model

    def train_step(self, micro_steps: Iterable[MicroStep]) -> StepReport:
        micro_steps = list(micro_steps)
        self.runner.begin(micro_steps)
        self.engine.train_batch(_nothing())
        (skipped, refused), self.optimizer.skip_step = self._agreed, False
        norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        losses = self.runner.losses
        dist.all_reduce(losses, group=self.topology.group("pp"))
        return StepReport(StepResult(norm, skipped, refused), losses, self._loads(), self.runner.taps)

    def _before_step(self) -> None:
        self._losses_finite = torch.isfinite(self.runner.losses).all()
        self._agreed = self._agree(gradient_tensors(self.engine))
        self.optimizer.skip_step = any(self._agreed)

    def _loads(self) -> dict[int, Tensor]:
        config = self.module.config
        blocks = [index for index, letter in enumerate(config.block_pattern) if letter == "E"]
        if not blocks:
            return {}
        loads = torch.zeros(len(blocks), config.num_experts, dtype=torch.int64, device=self.runner.losses.device)
        for row, block in enumerate(blocks):
            if block in self.runner.loads:
                loads[row] = self.runner.loads[block]
        dist.all_reduce(loads, group=self.topology.group("pp"))
        return dict(zip(blocks, loads))

    @torch.no_grad()
    def position_losses(self, tokens: Tensor, labels: Tensor, seq_idx: Tensor | None, plan: ElasticPlan) -> Tensor:
        """The chunks one after the other; every rank gets the losses."""
        model, group, rank = self.module, self.topology.group("pp"), self.topology.place("pp")
        context = model.training_context(tokens, seq_idx)
        x: Tensor | None = None
        out: Tensor | None = None
        for number, chunk in enumerate(self.stages.chunks):
            owner = self.stages.owner_of(number)
            before = self.stages.owner_of(number - 1) if number else owner
            if rank == before != owner:
                assert x is not None
                dist.send(x.contiguous(), group=group, group_dst=owner)
            if rank != owner:
                continue
            if before != owner:
                x = self._stream_like(tokens)
                dist.recv(x, group=group, group_src=before)
            x = model.run_chunk(chunk, x, tokens, labels, context, plan, False, "none")
            out = x if chunk.head else None
        out = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device) if out is None else out.contiguous()
        dist.broadcast(out, group=group, group_src=self.stages.loss_rank)
        return out

    def _stream_like(self, tokens: Tensor) -> Tensor:
        """Room for the residual stream between two stages."""
        tp, (batch, length) = self.module.tp, tokens.shape
        if tp.sequence_parallel:
            length = -(-length // tp.size)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return torch.empty(batch, length, self.module.config.hidden_size, dtype=dtype, device=tokens.device)


def _nothing() -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed's engine is given as data: chunks have theirs already."""
    while True:
        yield torch.zeros(1), torch.zeros(1)
