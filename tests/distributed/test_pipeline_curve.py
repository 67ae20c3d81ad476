"""Pipelines give the losses and gradient norms of a plain single-process loop, whatever the schedule."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from distributed.curve import plain_curve
from distributed.grids import slow

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
        slow(SANDWICH, 2, {"pp": 2}),
        (SANDWICH, 2, {"pp": 2, "bounds": [0, 2, 3]}),
        slow(EXPERTS, 2, {"pp": 2}),
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
        slow(EXPERTS, {"pp": 2, "tp": 2}),
        (EXPERTS, {"pp": 2, "tp": 2, "sp": True}),
        slow(EXPERTS, {"pp": 2}),
        slow(EXPERTS, {"pp": 2, "ep": 2}),
        slow(EXPERTS, {"pp": 2, "tp": 2, "ep": 2}),
        (EXPERTS | {"sampling": "sandwich"}, {"pp": 2, "ep": 2, **FOLDED}),
        slow(HYBRID, {"pp": 2, "tp": 2, **FOLDED}),
    ],
)
def test_four_ranks(workers, arguments, layout):
    compare(workers, arguments, 4, **layout)


@pytest.mark.parametrize("freeze", [["embedding", "attention", "mlp", "norm", "gain", "head"], ["mamba"]])
def test_stages_with_nothing_to_train(workers, freeze):
    """A stage of T blocks alone, then one of M blocks alone."""
    arguments = {"pattern": "TTMM", "sampling": "full", "mamba_use_mlp": False, "norm_weight": False}
    compare(workers, arguments, 2, freeze=freeze, pp=2)


@pytest.mark.parametrize(
    ("ranks", "layout", "head"),
    [(2, {"pp": 2}, 1), (4, {"pp": 4}, 3), (2, {"pp": 2, **FOLDED}, 0), (4, {"pp": 2, "tp": 2}, 2)],
)
def test_taps_reach_the_head_and_change_nothing(workers, ranks, layout, head):
    """States of single layers and the first embeddings are those of one process, and losses and norms the usual."""
    arguments = HYBRID | {"exits": 0.0}
    expected = reference(json.dumps(arguments), "[]")[:3]
    (alone,) = workers(1).run("curve", "tapped_curve", arguments=arguments)
    found = workers(ranks).run("curve", "tapped_curve", arguments=arguments, **layout)
    for job in (alone, *found):
        for (loss, norm), (wanted, wanted_norm) in zip(job["curve"], expected, strict=True):
            assert abs(loss - wanted) < 1e-5 and abs(norm - wanted_norm) < 1e-5 * wanted_norm
    assert len(alone["states"]) == 12 and len(alone["states"][0]) == 4
    for rank, job in enumerate(found):
        assert bool(job["states"]) == (rank == head or (rank == 3 and "tp" in layout))
    for one, other in zip(found[head]["states"], alone["states"], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert any(abs(value) > 1 for value in alone["states"][0][0][0])
