"""Narrow and early-leaving passes learn from the full pass: every layout gives the losses of a plain loop over whole
logits, whose cross entropy and divergence are torch's."""

from __future__ import annotations

import pytest
from distributed.grids import slow
from distributed.test_loss_curve import compare

HYBRID = {"pattern": "TMT", "sampling": "sandwich", "exits": 0.5, "mamba_num_groups": 2}
LEARNS = HYBRID | {"distill": {"share": 0.6, "temperature": 1.7}}
REVERSE = HYBRID | {"distill": {"share": 1.0, "temperature": 0.8, "divergence": "reverse"}, "tie_embeddings": True}
EXPERTS = LEARNS | {"pattern": "EME", "num_experts": 4, "experts_per_token": 2, "router_balance_weight": 0.05}
FOLDED = {"schedule": "dualpipev"}


@pytest.mark.parametrize(
    ("arguments", "ranks", "stage", "layout"),
    [
        slow(LEARNS, 1, 1, {}),
        slow(LEARNS, 2, 1, {}),
        (LEARNS, 2, 3, {}),
        slow(REVERSE, 2, 2, {}),
        slow(LEARNS, 2, 1, {"tp": 2}),
        (REVERSE, 2, 1, {"tp": 2, "sp": True}),
        slow(LEARNS, 2, 3, {"tp": 2, "sp": True}),
        slow(REVERSE, 4, 2, {"tp": 2, "sp": True}),
        slow(LEARNS, 2, 1, {"pp": 2}),
        slow(REVERSE, 2, 1, {"pp": 2}),
        (LEARNS, 2, 1, {"pp": 2, **FOLDED}),
        slow(LEARNS, 4, 1, {"pp": 2, "tp": 2}),
        slow(EXPERTS, 2, 1, {"ep": 2}),
        slow(EXPERTS, 2, 3, {"ep": 2}),
    ],
)
def test_layouts(workers, arguments, ranks, stage, layout):
    compare(workers, arguments, ranks, stage, **layout)
