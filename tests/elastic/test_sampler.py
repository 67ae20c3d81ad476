"""Plans are a pure function of (seed, step, plan number), whatever the layout."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import ElasticConfig
from megatron_adamba.elastic.sampler import PlanSampler

WIDTHS = [8, 16, 32]


def sampler(mode: str, seed: int = 5, **elastic) -> PlanSampler:
    shape = ModelConfig(
        hidden_size=32, block_pattern="TMTM", vocab_size=9, head_dim=8, mamba_head_dim=16, widths=WIDTHS
    )
    return PlanSampler(resolve_model(shape), ElasticConfig(width_sampling=mode, **elastic), seed)


def plans_of_step(mode: str, step: int, ranks: int, micro_batches: int = 8, **elastic):
    """(micro-batch, pass) -> plan as `ranks` ranks would ask for it, each with a sampler of its own."""
    found = {}
    for rank in range(ranks):
        mine = sampler(mode, **elastic)
        for index in range(micro_batches // ranks):
            number = index * ranks + rank
            for k in range(mine.passes):
                found[number, k] = mine.micro_batch_plan(step, number, micro_batches, k)
    return found


@pytest.mark.parametrize("mode", ["full", "uniform", "per_layer", "sandwich"])
def test_layouts_agree(mode):
    alone = plans_of_step(mode, 3, 1, plans_per_step=2)
    assert alone == plans_of_step(mode, 3, 2, plans_per_step=2) == plans_of_step(mode, 3, 4, plans_per_step=2)


def test_ranks_share_a_plan_at_each_accumulation_step():
    """With P plans that divide the accumulation, what runs at the same time on different ranks has one plan."""
    found = plans_of_step("per_layer", 1, 2, plans_per_step=4)
    for index in range(4):
        assert found[2 * index, 0] == found[2 * index + 1, 0]
    assert len({found[2 * index, 0] for index in range(4)}) > 1


def test_sandwich_starts_at_full_width():
    found = plans_of_step("sandwich", 2, 1, sandwich_passes=3)
    for (_, k), plan in found.items():
        assert k > 0 or plan.widths == (32,) * 4
    assert any(plan.widths != (32,) * 4 for plan in found.values())


def test_uniform_and_per_layer_draw_every_width_evenly():
    uniform, mixed = sampler("uniform"), sampler("per_layer")
    whole = Counter(uniform.plan(step, 0).widths for step in range(600))
    assert set(whole) == {(width,) * 4 for width in WIDTHS}
    each = Counter(width for step in range(600) for width in mixed.plan(step, 0).widths)
    for counts, expected in ((whole, 200), (each, 800)):
        assert all(abs(count - expected) < 0.25 * expected for count in counts.values()), counts


def test_another_seed_or_step_draws_anew():
    base = [sampler("per_layer").plan(step, 0) for step in range(50)]
    assert base == [sampler("per_layer").plan(step, 0) for step in range(50)]
    assert base != [sampler("per_layer", seed=6).plan(step, 0) for step in range(50)]
    assert base != [sampler("per_layer").plan(step, 1) for step in range(50)]
