"""One loss curve under tensor and sequence parallelism: 20 steps that equal a plain single-process loop.

At the narrowest width there is one KV group and one block of FFN rows, so that all ranks but the first own nothing of
it; the vocabulary of 53 is divided by no degree here, nor is the sequence of 13.
"""

from __future__ import annotations

import pytest
from distributed.grids import slow
from distributed.test_loss_curve import HYBRID, compare

GROUPS = {"mamba_num_groups": 4, "activation": "swiglu"}
PER_LAYER = HYBRID | GROUPS | {"sampling": "per_layer"}
SANDWICH = {
    "pattern": "MTM",
    "mamba_version": 1,
    "sampling": "sandwich",
    "tie_embeddings": True,
    "logit_softcap": 15.0,
    "sliding_window": 5,
    "window_pattern": "SL",
    "mamba_use_mlp": False,
    "embedding_norm": True,
}


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [
        (2, 1, {"tp": 2}),
        slow(2, 2, {"tp": 2}),
        slow(2, 3, {"tp": 2}),
        (2, 1, {"tp": 2, "sp": True}),
        (2, 3, {"tp": 2, "sp": True}),
        slow(2, 2, {"tp": 2, "sp": True, "offload": True}),
        slow(2, 3, {"tp": 2, "offload": True}),
        slow(4, 1, {"tp": 4}),
        slow(4, 3, {"tp": 4, "sp": True}),
        slow(4, 1, {"tp": 2}),
        slow(4, 2, {"tp": 2, "sp": True}),
        slow(4, 3, {"tp": 2}),
    ],
)
def test_per_layer_mamba2(workers, ranks, stage, layout):
    compare(workers, PER_LAYER, ranks, stage, **layout)


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [
        slow(2, 1, {"tp": 2}),
        (2, 2, {"tp": 2, "sp": True}),
        slow(2, 3, {"tp": 2}),
        slow(4, 2, {"tp": 4}),
        slow(4, 3, {"tp": 2, "sp": True}),
    ],
)
def test_sandwich_mamba1_tied_frozen(workers, ranks, stage, layout):
    compare(workers, SANDWICH, ranks, stage, freeze=("attention", "gain"), **layout)


@pytest.mark.parametrize(("stage", "sp"), [(1, False), (3, True)])
def test_frozen_embedding_and_mamba(workers, stage, sp):
    """Nothing below the first block needs a gradient, and no norm has a weight."""
    arguments = PER_LAYER | {"pattern": "TM", "norm_weight": False, "sampling": "uniform"}
    compare(workers, arguments, 2, stage, freeze=("embedding", "mamba"), tp=2, sp=sp)


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"),
    [slow(2, 1, {"tp": 2}), slow(2, 2, {"tp": 2, "sp": True}), (4, 1, {"tp": 2}), slow(4, 2, {"tp": 4})],
)
def test_muon_agrees_with_whole_matrices(workers, ranks, stage, layout):
    arguments = PER_LAYER | {"optimizer": "muon"}
    expected = workers(1).run("curve", "engine_curve", arguments=arguments, stage=0)[0]
    curve = workers(ranks).run("curve", "engine_curve", arguments=arguments, stage=stage, **layout)[0]
    for (loss, norm), (wanted, wanted_norm) in zip(curve, expected, strict=True):
        assert abs(loss - wanted) < 1e-5
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm


@pytest.mark.parametrize(
    ("ranks", "stage", "layout"), [(2, 1, {"tp": 2}), slow(2, 3, {"tp": 2, "sp": True}), slow(4, 2, {"tp": 2})]
)
def test_bf16(workers, ranks, stage, layout):
    single = workers(1).run("curve", "engine_curve", arguments=PER_LAYER, stage=1, bf16=True)[0]
    curve = workers(ranks).run("curve", "engine_curve", arguments=PER_LAYER, stage=stage, bf16=True, **layout)[0]
    for (loss, _), (alone, _) in zip(curve, single, strict=True):
        assert abs(loss - alone) < 0.01


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (4, 3)])
def test_all_ranks_report_the_same(workers, ranks, stage):
    curves = workers(ranks).run("curve", "engine_curve", arguments=PER_LAYER, stage=stage, tp=2, sp=True, steps=3)
    assert all(curve == curves[0] for curve in curves)
