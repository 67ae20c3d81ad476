"""Gates learn the same in every layout, and the backbone never notices them."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.grids import slow

HYBRID = {"pattern": "TMTM", "sampling": "sandwich", "exits": 0.5, "mixed": 0.5, "gate_size": 16, "mamba_num_groups": 2}
TIED = {
    "pattern": "MTT",
    "mamba_version": 1,
    "sampling": "sandwich",
    "exits": 0.5,
    "mixed": 0.5,
    "gate_size": 8,
    "tie_embeddings": True,
}
EXPERTS = {
    "pattern": "EEM",
    "sampling": "sandwich",
    "exits": 0.5,
    "mixed": 0.5,
    "gate_size": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "router_balance_weight": 0.05,
    "mamba_num_groups": 2,
}


@pytest.fixture(scope="module")
def alone(workers):
    @functools.cache
    def run(arguments: str, gated: bool, target: str = "relative") -> dict:
        settings = {"arguments": json.loads(arguments), "gated": gated, "target": target}
        (job,) = workers(1).run("gate_jobs", "gated_curve", stage=0, **settings)
        return job

    return run


@pytest.mark.parametrize("arguments", [HYBRID, TIED, EXPERTS])
def test_backbone_is_the_same_bit_for_bit(alone, arguments):
    """Losses, norms and all clipped updates."""
    words = json.dumps(arguments)
    with_gates, without = alone(words, True), alone(words, False)
    assert with_gates["curve"] == without["curve"] and any(norm > 0.3 for _, norm in without["curve"])
    assert with_gates["weights"] == without["weights"]
    assert with_gates["gates"] and with_gates["errors"][0] != with_gates["errors"][-1]


@pytest.mark.parametrize(
    ("arguments", "ranks", "stage", "layout"),
    [
        (HYBRID, 2, 1, {}),
        slow(HYBRID, 2, 2, {}),
        (HYBRID, 2, 3, {}),
        (HYBRID, 2, 1, {"tp": 2}),
        slow(HYBRID, 2, 2, {"tp": 2, "sp": True}),
        (TIED, 2, 3, {"tp": 2, "sp": True}),
        (EXPERTS, 2, 1, {"ep": 2}),
        (HYBRID, 2, 1, {"pp": 2}),
        slow(HYBRID, 4, 1, {"pp": 2, "tp": 2, "sp": True}),
        slow(TIED, 4, 1, {"pp": 2}),
        (HYBRID, 2, 1, {"target": "divergence"}),
        slow(HYBRID, 2, 1, {"target": "divergence", "tp": 2}),
        slow(TIED, 2, 3, {"target": "divergence", "tp": 2, "sp": True}),
        (HYBRID, 4, 1, {"target": "divergence", "pp": 2, "tp": 2, "sp": True}),
        (TIED, 4, 1, {"target": "divergence", "pp": 2}),
    ],
)
def test_gates_learn_what_they_learn_alone(workers, alone, arguments, ranks, stage, layout):
    expected = alone(json.dumps(arguments), True, layout.get("target", "relative"))
    jobs = workers(ranks).run("gate_jobs", "gated_curve", arguments=arguments, stage=stage, gated=True, **layout)
    holders = [job for job in jobs if job["gates"]]
    assert len(holders) == ranks // layout.get("pp", 1)
    for job in holders:
        for mine, theirs in zip(job["errors"], expected["errors"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        for name, value in job["gates"].items():
            assert value == pytest.approx(expected["gates"][name], abs=2e-3), name
    for (loss, norm), (wanted, wanted_norm) in zip(jobs[0]["curve"], expected["curve"], strict=True):
        assert abs(loss - wanted) < 1e-5 and abs(norm - wanted_norm) < 1e-5 * wanted_norm
