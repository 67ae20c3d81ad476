"""Pipelines give the losses and gradient norms of a plain single-process loop, whatever the schedule."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.curve import plain_curve

HYBRID = {"pattern": "TMTM", "sampling": "per_layer", "exits": 0.5, "mamba_num_groups": 2}


@functools.cache
def reference(arguments: str, freeze: str) -> list[tuple[float, float]]:
    return plain_curve(json.loads(arguments), json.loads(freeze))


def compare(workers, arguments, ranks, freeze=(), **layout):
    expected = reference(json.dumps(arguments), json.dumps(list(freeze)))
    curves = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=1, freeze=list(freeze), **layout)
    assert any(norm > 0.3 for _, norm in expected), "clipping must be active, or the norm proves nothing"
    assert all(curve == curves[0] for curve in curves), "every stage knows the loss and the norm"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(curves[0], expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


def test_two_stages(workers):
    compare(workers, HYBRID, 2, pp=2)


SANDWICH = {"pattern": "MTT", "mamba_version": 1, "sampling": "sandwich", "exits": 0.9, "tie_embeddings": True}
EXPERTS = {
    "pattern": "EMTE",
    "sampling": "per_layer",
    "exits": 0.4,
    "num_experts": 4,
    "experts_per_token": 2,
    "attention_sinks": True,
    "router_balance_weight": 0.05,
    "mamba_num_groups": 2,
}
FOLDED = {"schedule": "dualpipev"}


@pytest.mark.parametrize(
    ("arguments", "ranks", "layout"),
    [
        (SANDWICH, 2, {"pp": 2}),
        (SANDWICH, 2, {"pp": 2, "bounds": [0, 2, 3]}),
        (EXPERTS, 2, {"pp": 2}),
        (EXPERTS, 2, {"pp": 2, "bounds": [0, 1, 4]}),
        (HYBRID, 2, {"pp": 2, **FOLDED}),
        (EXPERTS, 2, {"pp": 2, **FOLDED}),
        (HYBRID | {"tie_embeddings": True}, 2, {"pp": 2, **FOLDED}),
    ],
)
def test_two_ranks(workers, arguments, ranks, layout):
    compare(workers, arguments, ranks, **layout)


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        (EXPERTS, {"pp": 4}),
        (HYBRID | {"tie_embeddings": True, "sampling": "sandwich"}, {"pp": 4}),
        (EXPERTS, {"pp": 2, "tp": 2}),
        (EXPERTS, {"pp": 2, "tp": 2, "sp": True}),
        (EXPERTS, {"pp": 2}),
        (EXPERTS, {"pp": 2, "ep": 2}),
        (EXPERTS, {"pp": 2, "tp": 2, "ep": 2}),
        (EXPERTS, {"pp": 2, "ep": 2, **FOLDED}),
        (HYBRID, {"pp": 2, "tp": 2, **FOLDED}),
    ],
)
def test_four_ranks(workers, arguments, layout):
    compare(workers, arguments, 4, **layout)


@pytest.mark.parametrize("freeze", [["embedding", "attention", "mlp", "norm", "gain", "head"], ["mamba"]])
def test_stages_with_nothing_to_train(workers, freeze):
    """A stage of T blocks alone, then one of M blocks alone."""
    arguments = {"pattern": "TTMM", "sampling": "full", "mamba_use_mlp": False, "norm_weight": False}
    compare(workers, arguments, 2, freeze=freeze, pp=2)
