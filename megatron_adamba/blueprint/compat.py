"""What combines with what: one table, checked when the command line is parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rule:
    """A combination that is refused."""

    name: str
    broken: Callable[[RunSetup], bool]
    message: Callable[[RunSetup], str]


def _accumulation(setup: RunSetup) -> float:
    return setup.config.train.global_batch_size / (setup.config.train.micro_batch_size * setup.world_size)


def _legal_batch(setup: RunSetup) -> int:
    """The smallest multiple of all ranks' micro-batches that holds the batch asked for."""
    part = setup.config.train.micro_batch_size * setup.world_size
    return max(part, -(-setup.config.train.global_batch_size // part) * part)


def _legal_plans(setup: RunSetup) -> list[int]:
    steps = int(_accumulation(setup))
    return [n for n in range(1, steps + 1) if steps % n == 0]


RULES: tuple[Rule, ...] = (
    Rule(
        "tensor, pipeline and expert parallelism",
        lambda s: max(s.config.parallel.tp, s.config.parallel.pp, s.config.parallel.ep) > 1,
        lambda s: (
            "--parallel: this version runs data parallelism and ZeRO 1 to 3; "
            "use --parallel.tp 1 --parallel.pp 1 --parallel.ep 1"
        ),
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
            f"micro_batch_size x ranks = {s.config.train.micro_batch_size} x {s.world_size}; try {_legal_batch(s)}"
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
