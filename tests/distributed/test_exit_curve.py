"""Plans that leave early keep the one loss curve, also in steps in which no plan reaches the last block."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.curve import MICRO_BATCHES, plain_curve, run_config
from distributed.grids import slow

from megatron_adamba.elastic.sampler import PlanSampler

HYBRID = {"pattern": "TMTM", "sampling": "per_layer", "exits": 0.9, "plans_per_step": 1}
SANDWICH = {"pattern": "MTT", "mamba_version": 1, "sampling": "sandwich", "exits": 0.9, "tie_embeddings": True}
EXPERTS = {
    "pattern": "EEM",
    "sampling": "per_layer",
    "exits": 0.7,
    "plans_per_step": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "attention_sinks": True,
    "router_balance_weight": 0.05,
    "mamba_num_groups": 2,
}


@functools.cache
def reference(arguments: str) -> list[tuple[float, float]]:
    return plain_curve(json.loads(arguments), [])


def compare(workers, arguments, ranks, stage, **layout):
    expected = reference(json.dumps(arguments))
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage, **layout)[0]
    assert any(norm > 0.3 for _, norm in expected), "clipping must be active, or the norm proves nothing"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(curve, expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


def exits_of(arguments) -> list[list[int]]:
    """By step, where each pass of each micro-batch leaves."""
    config = run_config(**arguments)
    sampler = PlanSampler(config.model, config.elastic, config.train.seed)
    return [
        [
            sampler.micro_batch_plan(step, number, MICRO_BATCHES, k).exit_layer
            for number in range(MICRO_BATCHES)
            for k in range(sampler.passes)
        ]
        for step in range(20)
    ]


@pytest.mark.parametrize("arguments", [HYBRID, EXPERTS])
def test_some_steps_touch_no_last_block(arguments):
    """Or the curves would prove nothing."""
    steps, last = exits_of(arguments), len(arguments["pattern"])
    assert sum(max(step) < last for step in steps) >= 5 and any(max(step) == last for step in steps)
    assert min(min(step) for step in steps) == 1


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (2, 2, {}),
        (2, 3, {}),
        (2, 2, {"offload": True}),
        slow(2, 3, {"offload": True}),
        slow(2, 1, {"tp": 2}),
        slow(2, 3, {"tp": 2, "sp": True}),
    ],
)
def test_per_layer(workers, ranks, stage, layout):
    arguments = HYBRID | {"mamba_num_groups": 2}
    compare(workers, arguments, ranks, stage, **layout)


@pytest.mark.parametrize(("ranks", "stage", "layout"), [(2, 1, {}), (2, 3, {}), (2, 2, {"tp": 2})])
def test_sandwich(workers, ranks, stage, layout):
    compare(workers, SANDWICH, ranks, stage, **layout)


@pytest.mark.parametrize("stage", [1, slow(2), 3])
def test_experts(workers, stage):
    compare(workers, EXPERTS, 2, stage, ep=2)
