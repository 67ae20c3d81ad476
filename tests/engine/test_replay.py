"""The formulas for waits and activations against DeepSpeed's own schedules, played command by command."""

from __future__ import annotations

import pytest

from megatron_adamba.blueprint.stages import StagePlan, num_chunks
from megatron_adamba.engine.replay import replay

CASES = [(pp, schedule, m) for pp in (2, 3, 4, 8) for schedule in ("1f1b", "dualpipev") for m in (2 * pp, 32)]


def plan(pp: int, schedule: str) -> StagePlan:
    return StagePlan(pp, schedule, tuple(range(num_chunks(pp, schedule) + 1)))


@pytest.mark.parametrize(("pp", "schedule", "micro_steps"), CASES)
def test_equal_chunks_wait_as_the_formula_says(pp, schedule, micro_steps):
    stages = plan(pp, schedule)
    unit = pp / stages.num_chunks
    played = replay(stages, micro_steps, [unit] * stages.num_chunks, [2 * unit] * stages.num_chunks)
    assert played.bubble == pytest.approx(stages.bubble(micro_steps))
    assert played.busy == pytest.approx((3.0 * micro_steps,) * pp)


@pytest.mark.parametrize(("pp", "schedule", "micro_steps"), CASES)
def test_activations_kept(pp, schedule, micro_steps):
    stages = plan(pp, schedule)
    played = replay(stages, micro_steps, [1.0] * stages.num_chunks, [2.0] * stages.num_chunks)
    for rank, peak in enumerate(played.peaks):
        assert sum(peak.values()) == stages.in_flight(rank, micro_steps)
        assert set(peak) <= set(stages.numbers_of(rank))


def test_the_slowest_stage_sets_the_pace():
    stages = plan(2, "1f1b")
    played = replay(stages, 16, [1.0, 3.0], [2.0, 6.0])
    assert played.duration == pytest.approx(16 * 9 + 1 + 2) and played.busy == pytest.approx((48.0, 144.0))


def test_one_rank_never_waits():
    played = replay(StagePlan(1, "1f1b", (0, 4)), 5, [1.0], [2.0])
    assert (played.duration, played.bubble) == (15.0, 0.0) and StagePlan(1, "1f1b", (0, 4)).bubble(5) == 0
