"""Phase 3: old weights take a tenth of each update, element by element, in every layout."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.curve import plain_curve
from distributed.grids import slow

HYBRID = {"pattern": "TMT", "sampling": "per_layer", "mamba_num_groups": 2, "expanded": True, "exits": 0.3}
MAMBA1 = {"pattern": "MT", "mamba_version": 1, "sampling": "sandwich", "expanded": True, "activation": "swiglu"}
EXPERTS = {
    "pattern": "EM",
    "sampling": "per_layer",
    "plans_per_step": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "attention_sinks": True,
    "mamba_num_groups": 2,
    "expanded": True,
}


@functools.cache
def reference(arguments: str) -> list[tuple[float, float]]:
    return plain_curve(json.loads(arguments), [])


def compare(workers, arguments, ranks, stage, **layout):
    expected = reference(json.dumps(arguments))
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage, **layout)[0]
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(curve, expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


@pytest.mark.parametrize("arguments", [HYBRID, MAMBA1, EXPERTS])
def test_it_makes_a_difference(arguments):
    plain = reference(json.dumps(arguments | {"expanded": False}))
    slowed = reference(json.dumps(arguments))
    assert plain[0] == slowed[0] and abs(plain[-1][0] - slowed[-1][0]) > 1e-3


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [
        (1, 0, {}),
        (1, 1, {}),
        (2, 1, {}),
        (2, 2, {}),
        (2, 3, {}),
        (2, 2, {"offload": True}),
        slow(2, 3, {"offload": True}),
        (2, 1, {"tp": 2}),
        slow(2, 3, {"tp": 2}),
    ],
)
def test_hybrid(workers, ranks, stage, layout):
    compare(workers, HYBRID, ranks, stage, **layout)


@pytest.mark.parametrize(("ranks", "stage", "layout"), [(1, 1, {}), (2, 2, {}), slow(2, 1, {"tp": 2})])
def test_mamba1(workers, ranks, stage, layout):
    compare(workers, MAMBA1, ranks, stage, **layout)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts(workers, stage):
    compare(workers, EXPERTS, 2, stage, ep=2)


@pytest.mark.parametrize(("ranks", "stage", "layout"), [(1, 1, {}), (2, 1, {}), slow(2, 2, {"tp": 2})])
def test_muon(workers, ranks, stage, layout):
    arguments = HYBRID | {"optimizer": "muon"}
    expected = workers(1).run("curve", "engine_curve", arguments=arguments, stage=0)[0]
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage, **layout)[0]
    for (loss, norm), (wanted, wanted_norm) in zip(curve, expected, strict=True):
        assert abs(loss - wanted) < 1e-5 and abs(norm - wanted_norm) < 1e-5 * wanted_norm
