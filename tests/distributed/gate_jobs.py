"""Jobs in which gates learn beside the engine."""

from __future__ import annotations

from typing import Any

from curve import MICRO_BATCHES, SEQ_LEN, build_session, micro_batch, run_config
from gate_parts import SPANS, gate_setup

from megatron_adamba.elastic.sampler import PlanSampler
from megatron_adamba.engine.session import MicroStep
from megatron_adamba.training.gates import GateTrainer
from megatron_adamba.training.schedule import learning_rate_factor


def gated_curve(
    info,
    arguments: dict[str, Any],
    stage: int,
    gated: bool,
    steps: int = 6,
    target: str = "relative",
    **layout: Any,
) -> dict:
    """A job: losses and norms, the backbone's weights as one number each, and the gates' weights and errors on the
    ranks that have them. gated: False leaves taps and gates out."""
    config = run_config(**arguments)
    session = build_session(info, config, stage, **layout)
    sampler, topology = PlanSampler(config.model, config.elastic, config.train.seed), session.topology
    setup = gate_setup(config, SEQ_LEN, target=target)
    has_head = getattr(session, "stages", None) is None or topology.place("pp") == session.stages.loss_rank
    trainer = GateTrainer(setup, topology, info.device) if gated and has_head else None
    dp, dp_rank = topology.size("dp"), topology.place("dp")
    numbers = range(dp_rank, MICRO_BATCHES, dp)
    curve, errors = [], []
    for step in range(steps):
        session.set_learning_rates(learning_rate_factor(config.optimizer, step, config.train.steps))
        request = setup.request(step, SPANS, info.device) if gated else None
        plans = [sampler.micro_batch_plan(step, n, MICRO_BATCHES, k) for n in numbers for k in range(sampler.passes)]
        micro_steps = [
            MicroStep(**micro_batch(step, numbers[place // sampler.passes]), plan=plan, taps=request)
            for place, plan in enumerate(plans)
        ]
        report = session.train_step(micro_steps)
        if trainer is not None:
            found = trainer.learn(plans, report.taps, [SPANS] * len(numbers))
            errors.append(session.mean_over_ranks(found).tolist())
        curve.append((session.mean_over_ranks(report.losses.mean()).item(), report.result.grad_norm))
    gates = {}
    if trainer is not None:
        gates = {name: parameter.double().sum().item() for name, parameter in trainer.gates.named_parameters()}
    weights = {}
    if stage == 0:
        weights = {name: value.detach().flatten().tolist() for name, value in session.module.named_parameters()}
    return {"curve": curve, "gates": gates, "errors": errors, "weights": weights}
