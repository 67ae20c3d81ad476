"""A step with a loss or gradient that is not finite on any rank changes nothing on every rank."""

from __future__ import annotations

import pytest

HYBRID = {"pattern": "TMT", "mamba_version": 2, "sampling": "per_layer"}


@pytest.mark.parametrize(
    ("ranks", "stage", "offload", "bf16"),
    [
        (1, 0, False, False),
        (1, 1, False, False),
        (2, 1, False, True),
        (2, 2, False, False),
        (2, 2, False, True),
        (2, 2, True, True),
        (2, 2, True, False),
        (2, 3, False, False),
        (2, 3, True, False),
    ],
)
def test_skipped_step_leaves_no_trace(workers, ranks, stage, offload, bf16):
    settings = {"arguments": HYBRID, "stage": stage, "offload": offload, "bf16": bf16}
    clean = workers(ranks).run("curve", "engine_curve", **settings, steps=10)[0]
    for skipped, *curve in workers(ranks).run("curve", "poisoned_curve", **settings, poisoned_rank=ranks - 1):
        assert skipped
        assert curve == clean
