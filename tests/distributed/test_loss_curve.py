"""One loss curve: every layout gives the losses and gradient norms of a plain single-process loop."""

from __future__ import annotations

import functools
import json

import pytest
from distributed.curve import plain_curve
from distributed.grids import slow

HYBRID = {"pattern": "TMT", "mamba_version": 2}
LAYOUTS = [
    (ranks, stage, offload)
    for ranks in (1, 2)
    for stage in (1, 2, 3)
    for offload in (False, True)
    if not (offload and stage == 1)
] + [(1, 0, False)]


@functools.cache
def reference(arguments: str, freeze: str) -> list[tuple[float, float]]:
    return plain_curve(json.loads(arguments), json.loads(freeze))


def compare(workers, arguments, ranks, stage, freeze=(), **layout):
    expected = reference(json.dumps(arguments), json.dumps(list(freeze)))
    curve = workers(ranks).run(
        "curve", "engine_curve", arguments=arguments, stage=stage, freeze=list(freeze), **layout
    )[0]
    assert any(norm > 0.3 for _, norm in expected), "clipping must be active, or the norm proves nothing"
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(curve, expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


@pytest.mark.parametrize(("ranks", "stage", "offload"), LAYOUTS)
def test_layouts(workers, ranks, stage, offload):
    compare(workers, HYBRID | {"sampling": "per_layer"}, ranks, stage, offload=offload)


@pytest.mark.parametrize(("ranks", "stage", "offload"), [(1, 1, False), (2, 1, False), (2, 2, True), (2, 3, False)])
def test_sandwich_mamba1_tied_frozen(workers, ranks, stage, offload):
    arguments = {
        "pattern": "MTM",
        "mamba_version": 1,
        "sampling": "sandwich",
        "tie_embeddings": True,
        "activation": "swiglu",
        "logit_softcap": 15.0,
        "sliding_window": 5,
        "window_pattern": "SL",
        "mamba_use_mlp": False,
    }
    compare(workers, arguments, ranks, stage, freeze=("attention", "gain"), offload=offload)


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3)])
def test_frozen_embedding_and_uniform(workers, ranks, stage):
    """Nothing below the first block needs a gradient, so nested weights have to ask for backward themselves."""
    arguments = HYBRID | {"sampling": "uniform", "pattern": "TT", "norm_weight": False}
    compare(workers, arguments, ranks, stage, freeze=("embedding", "norm", "gain"))


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3)])
def test_a_schedule_of_stages(workers, ranks, stage):
    """Full width first, then widths by weights, then mixes that may leave early."""
    stages = [
        {"until": 0.2, "width_sampling": "full"},
        {"until": 11, "width_sampling": "uniform", "width_weights": [2, 0, 1]},
        {"exit_fraction": 0.5},
    ]
    elastic = {"schedule": stages, "uniform_share": 0.3, "width_weights": [1, 1, 2]}
    compare(workers, HYBRID | {"sampling": "per_layer", "elastic": elastic}, ranks, stage)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_muon_agrees_with_whole_matrices(workers, ranks, stage):
    arguments = HYBRID | {"sampling": "per_layer", "optimizer": "muon"}
    expected = workers(1).run("curve", "engine_curve", arguments=arguments, stage=0)[0]
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage)[0]
    for (loss, norm), (wanted, wanted_norm) in zip(curve, expected, strict=True):
        assert abs(loss - wanted) < 1e-5
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), slow(1, 2), slow(2, 1), (2, 2), (2, 3)])
def test_bf16(workers, ranks, stage):
    arguments = HYBRID | {"sampling": "per_layer"}
    expected = reference(json.dumps(arguments), json.dumps([]))
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage, bf16=True)[0]
    single = workers(1).run("curve", "engine_curve", arguments=arguments, stage=1, bf16=True)[0]
    for (loss, _), (alone, _) in zip(curve, single, strict=True):
        assert abs(loss - alone) < 0.01
    assert abs(curve[0][0] - expected[0][0]) < 0.05, "bf16 starts where fp32 does"
