"""One loss curve with mixtures of experts, the balancing loss on: data, expert, tensor and sequence parallelism."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.curve import plain_curve
from distributed.grids import slow

EXPERTS = {
    "pattern": "ETME",
    "mamba_num_groups": 2,
    "sampling": "per_layer",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_size": 48,
    "router_balance_weight": 0.05,
    "router_z_weight": 0.01,
    "attention_sinks": True,
    "rope_factor": 8.0,
    "rope_original_context": 16,
    "sliding_window": 5,
    "window_pattern": "SL",
}
ONE_PLAN = EXPERTS | {"plans_per_step": 1}
"""ranks that exchange tokens share a plan, and four replicas have one micro-batch each"""


@functools.cache
def reference(arguments: str, freeze: str, skew: float) -> list[tuple[float, float]]:
    return plain_curve(json.loads(arguments), json.loads(freeze), skew=skew)


def compare(workers, arguments, ranks, stage, freeze=(), skew=0.0, **layout):
    expected = reference(json.dumps(arguments), json.dumps(list(freeze)), skew)
    job = {"arguments": arguments, "stage": stage, "freeze": list(freeze), "skew": skew, **layout}
    curve = workers(ranks).run("curve", "engine_curve", **job)[0]
    assert any(norm > 0.3 for _, norm in expected), "clipping must be active, or the norm proves nothing"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(curve, expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [
        (1, 1, {}),
        (2, 1, {}),
        slow(2, 2, {"offload": True}),
        slow(2, 3, {"offload": True}),
        (2, 1, {"ep": 2}),
        slow(2, 2, {"ep": 2}),
        (2, 3, {"ep": 2}),
        slow(2, 1, {"tp": 2}),
        (2, 2, {"tp": 2, "ep": 2}),
        slow(2, 3, {"tp": 2, "ep": 2, "sp": True}),
        (4, 1, {"ep": 2}),
        slow(4, 3, {"ep": 2}),
        slow(4, 2, {"tp": 2, "ep": 2}),
        slow(4, 3, {"tp": 2, "ep": 2}),
        slow(4, 1, {"tp": 2, "ep": 4, "sp": True}),
    ],
)
def test_per_layer(workers, ranks, stage, layout):
    arguments = ONE_PLAN if ranks // layout.get("tp", 1) == 4 else EXPERTS
    compare(workers, arguments, ranks, stage, **layout)


@pytest.mark.parametrize("stage", [1, slow(3)])
def test_four_expert_parallel_ranks(workers, stage):
    compare(workers, ONE_PLAN, 4, stage, ep=4)


@pytest.mark.parametrize(("ranks", "stage", "layout"), [slow(2, 3, {}), (2, 1, {"ep": 2}), (2, 3, {"ep": 2})])
def test_a_skewed_router(workers, ranks, stage, layout):
    """Every token goes to the first rank's experts; the other rank has nothing to do, and takes part."""
    compare(workers, EXPERTS, ranks, stage, skew=30.0, **layout)


@pytest.mark.parametrize(("stage", "layout"), [slow(1, {"ep": 2}), (3, {}), slow(2, {"tp": 2, "ep": 2})])
def test_odd_experts_sandwich_and_a_frozen_router(workers, stage, layout):
    experts = {"num_experts": 5 if not layout else 6, "experts_per_token": 3, "sampling": "sandwich"}
    compare(workers, EXPERTS | experts, 2, stage, freeze=("router", "norm"), **layout)


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"), [slow(2, 1, {"ep": 2}), slow(2, 2, {"tp": 2}), (2, 3, {"ep": 2})]
)
def test_frozen_experts(workers, ranks, stage, layout):
    compare(workers, EXPERTS, ranks, stage, freeze=("expert", "attention"), **layout)


@pytest.mark.parametrize(("ranks", "stage", "layout"), [slow(2, 1, {}), (2, 2, {"ep": 2}), slow(2, 3, {"ep": 2})])
def test_bf16(workers, ranks, stage, layout):
    single = workers(1).run("curve", "engine_curve", arguments=EXPERTS, stage=1, bf16=True)[0]
    curve = workers(ranks).run("curve", "engine_curve", arguments=EXPERTS, stage=stage, bf16=True, **layout)[0]
    for (loss, _), (alone, _) in zip(curve, single, strict=True):
        assert abs(loss - alone) < 0.01
