"""What combines with what: one table, checked when the command line is parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_adamba.blueprint.degrees import legal_tp_degrees, obstacle
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
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
    def ep(self) -> int:
        return self.config.parallel.ep

    @property
    def dp(self) -> int:
        return max(1, self.world_size // (self.tp * self.config.parallel.pp))

    @property
    def model(self) -> ModelConfig:
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


def _legal_ep(setup: RunSetup) -> list[int]:
    ranks, experts = setup.dp * setup.tp, setup.model.num_experts
    return [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0 and (experts or n == 1)]


def _legal_plans(setup: RunSetup) -> list[int]:
    steps = int(_accumulation(setup))
    return [n for n in range(1, steps + 1) if steps % n == 0]


RULES: tuple[Rule, ...] = (
    Rule(
        "pipeline parallelism",
        lambda s: s.config.parallel.pp > 1,
        lambda s: (
            "--parallel: this version runs data, tensor, sequence and expert parallelism and ZeRO 1 to 3; "
            "use --parallel.pp 1"
        ),
    ),
    Rule(
        "a tensor-parallel degree that the ranks do not have",
        lambda s: s.world_size % s.tp != 0,
        lambda s: (
            f"--parallel.tp {s.tp}: must divide the {s.world_size} ranks that the launcher starts; "
            f"one of {[n for n in range(1, s.world_size + 1) if s.world_size % n == 0]}"
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
        lambda s: s.config.train.phase == 1 and s.config.elastic.width_sampling != "full",
        lambda s: (
            f"--train.phase 1: trains at full width, not with --elastic.width_sampling "
            f"{s.config.elastic.width_sampling}; use --elastic.width_sampling full"
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
