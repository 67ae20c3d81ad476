"""What combines with what: one table, checked when the command line is parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_adamba.blueprint.degrees import legal_tp_degrees, obstacle
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import least_micro_steps, num_chunks
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import ConfigError


@dataclass(frozen=True)
class RunSetup:
    """What the rules look at: our config, what the ds_config says, and the number of ranks."""

    config: AdambaConfig
    zero_stage: int
    offload: bool
    world_size: int
    bf16: bool

    @property
    def tp(self) -> int:
        return self.config.parallel.tp

    @property
    def pp(self) -> int:
        return self.config.parallel.pp

    @property
    def schedule(self) -> str:
        return self.config.parallel.pipeline_schedule

    @property
    def chunks(self) -> int:
        return num_chunks(self.pp, self.schedule)

    @property
    def ep(self) -> int:
        return self.config.parallel.ep

    @property
    def dp(self) -> int:
        return max(1, self.world_size // (self.tp * self.pp))

    @property
    def model(self) -> ResolvedModel:
        return resolve_model(self.config.model)


@dataclass(frozen=True)
class Rule:
    """A combination that is refused."""

    name: str
    broken: Callable[[RunSetup], bool]
    message: Callable[[RunSetup], str]


def _accumulation(setup: RunSetup) -> float:
    return setup.config.train.global_batch_size / (setup.config.train.micro_batch_size * setup.dp)


def _legal_batch(setup: RunSetup) -> int:
    """The smallest multiple of all replicas' micro-batches that holds the batch asked for."""
    part = setup.config.train.micro_batch_size * setup.dp
    return max(part, -(-setup.config.train.global_batch_size // part) * part)


def micro_steps(config: AdambaConfig, replicas: int = 1) -> int:
    """Passes of micro-batches in a step on one of so many replicas."""
    passes = config.elastic.passes
    return config.train.global_batch_size // (config.train.micro_batch_size * replicas) * passes


def _micro_steps(setup: RunSetup) -> int:
    return micro_steps(setup.config, setup.dp)


def _pipeline_batch(setup: RunSetup) -> int:
    """The batch with which the pipeline has enough to do."""
    passes = _micro_steps(setup) // int(_accumulation(setup))
    least = -(-least_micro_steps(setup.pp, setup.schedule) // passes)
    return least * setup.config.train.micro_batch_size * setup.dp


def _legal_pp(setup: RunSetup) -> list[int]:
    ranks = setup.world_size // setup.tp
    return [n for n in range(1, ranks + 1) if ranks % n == 0]


def _fitting_pp(setup: RunSetup) -> str:
    depth = setup.model.num_layers
    if setup.schedule != "1f1b" and setup.pp <= depth:
        return "--parallel.pipeline_schedule 1f1b"
    return f"--parallel.pp {max(n for n in _legal_pp(setup) if num_chunks(n, setup.schedule) <= depth or n == 1)}"


def _legal_ep(setup: RunSetup) -> list[int]:
    ranks, experts = setup.dp * setup.tp, setup.model.num_experts
    return [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0 and (experts or n == 1)]


def _legal_plans(setup: RunSetup) -> list[int]:
    steps = int(_accumulation(setup))
    return [n for n in range(1, steps + 1) if steps % n == 0]


RULES: tuple[Rule, ...] = (
    Rule(
        "a tensor-parallel degree that the ranks do not have",
        lambda s: s.world_size % s.tp != 0,
        lambda s: (
            f"--parallel.tp {s.tp}: must divide the {s.world_size} ranks that the launcher starts; "
            f"one of {[n for n in range(1, s.world_size + 1) if s.world_size % n == 0]}"
        ),
    ),
    Rule(
        "a pipeline that the ranks do not have",
        lambda s: s.world_size % (s.tp * s.pp) != 0,
        lambda s: (
            f"--parallel.pp {s.pp} x --parallel.tp {s.tp}: must divide the {s.world_size} ranks that the launcher "
            f"starts; with this tp, pp may be one of {_legal_pp(s)}"
        ),
    ),
    Rule(
        "a pipeline with more chunks than blocks",
        lambda s: s.pp > 1 and s.chunks > s.model.num_layers,
        lambda s: (
            f"--parallel.pp {s.pp}: {s.schedule} runs {s.chunks} chunks, and the pattern has {s.model.num_layers} "
            f"blocks; use {_fitting_pp(s)}"
        ),
    ),
    Rule(
        "a pipeline with other ZeRO stages than 1",
        lambda s: s.pp > 1 and s.zero_stage > 1,
        lambda s: (
            f"--parallel.pp {s.pp}: runs with ZeRO 1, not {s.zero_stage}, as gradients are complete only behind the "
            f"last micro-batch; use --deepspeed_config zero1"
        ),
    ),
    Rule(
        "a tensor-parallel degree that the model does not have",
        lambda s: s.tp > 1 and obstacle(s.model, s.tp) is not None,
        lambda s: f"--parallel.tp {s.tp}: {obstacle(s.model, s.tp)}; this model takes {legal_tp_degrees(s.model)}",
    ),
    Rule(
        "an expert-parallel degree that does not fit",
        lambda s: s.ep > 1 and s.ep not in _legal_ep(s),
        lambda s: (
            f"--parallel.ep {s.ep}: must divide the {s.model.num_experts} experts and the {s.dp * s.tp} ranks of "
            f"dp x tp; one of {_legal_ep(s)}"
        ),
    ),
    Rule(
        "sequence parallelism without tensor parallelism",
        lambda s: s.config.parallel.sp and s.tp == 1,
        lambda s: "--parallel.sp true: shares the sequence over the tp ranks; give --parallel.tp 2 or more",
    ),
    Rule(
        "ZeRO 0 on several processes",
        lambda s: s.zero_stage == 0 and s.world_size > 1,
        lambda s: f"--deepspeed_config: zero stage 0 on {s.world_size} processes miscounts gradient norms; use stage 1",
    ),
    Rule(
        "ZeRO 0 with bf16",
        lambda s: s.zero_stage == 0 and s.bf16,
        lambda s: "--deepspeed_config: zero stage 0 keeps no fp32 weights under bf16; use stage 1",
    ),
    Rule(
        "phase 1 at other widths than the full one",
        lambda s: s.config.train.phase == 1 and s.config.elastic.samples_widths,
        lambda s: (
            f"--train.phase 1: trains at full width, not with --elastic.width_sampling "
            f"{s.config.elastic.width_sampling}{' and a schedule' if s.config.elastic.schedule else ''}; use "
            f"--elastic.width_sampling full without --elastic.schedule"
        ),
    ),
    Rule(
        "distillation without a full pass",
        lambda s: s.config.distill.on and s.config.elastic.width_sampling != "sandwich",
        lambda s: (
            f"--distill.share {s.config.distill.share}: narrow passes learn from the full pass of the same tokens, "
            f"which --elastic.width_sampling {s.config.elastic.width_sampling} does not make; use sandwich, or "
            f"--distill.share 0"
        ),
    ),
    Rule(
        "Muon with ZeRO 3",
        lambda s: s.zero_stage == 3 and s.config.optimizer.name == "muon",
        lambda s: "--optimizer.name muon: needs whole matrices, which ZeRO 3 does not keep; use zero stage 2 or adamw",
    ),
    Rule(
        "Muon with offload",
        lambda s: s.offload and s.config.optimizer.name == "muon",
        lambda s: "--optimizer.name muon: does not run with offload; use zero stage 2 without offload, or adamw",
    ),
    Rule(
        "offload with ZeRO 0 or 1",
        lambda s: s.offload and s.zero_stage < 2,
        lambda s: f"--deepspeed_config: offload_optimizer with zero stage {s.zero_stage}; use stage 2 or 3",
    ),
    Rule(
        "a batch that does not divide",
        lambda s: _accumulation(s) != int(_accumulation(s)) or _accumulation(s) < 1,
        lambda s: (
            f"--train.global_batch_size {s.config.train.global_batch_size}: must be a multiple of "
            f"micro_batch_size x replicas = {s.config.train.micro_batch_size} x {s.dp}; try {_legal_batch(s)}"
        ),
    ),
    Rule(
        "a pipeline with too few micro-batches",
        lambda s: s.pp > 1 and _micro_steps(s) < least_micro_steps(s.pp, s.schedule),
        lambda s: (
            f"--parallel.pp {s.pp}: {s.schedule} needs {least_micro_steps(s.pp, s.schedule)} passes of micro-batches "
            f"in a step, and there are {_micro_steps(s)}; use --train.global_batch_size {_pipeline_batch(s)}"
        ),
    ),
    Rule(
        "plans that do not divide the accumulation",
        lambda s: int(_accumulation(s)) % s.config.elastic.plans_per_step != 0,
        lambda s: (
            f"--elastic.plans_per_step {s.config.elastic.plans_per_step}: must divide the "
            f"{int(_accumulation(s))} accumulation steps; one of {_legal_plans(s)}"
        ),
    ),
)
"""Checked in this order; the first that is broken is reported."""


def check_combination(setup: RunSetup) -> None:
    """Raises ConfigError with the nearest setting that works."""
    for rule in RULES:
        if rule.broken(setup):
            raise ConfigError(rule.message(setup))
