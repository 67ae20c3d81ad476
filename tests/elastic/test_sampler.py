"""Plans are a pure function of (seed, step, plan number), whatever the layout."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import ElasticConfig, ElasticStage
from megatron_adamba.elastic.sampler import PlanSampler
from megatron_adamba.errors import ConfigError

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


def test_weights_say_how_often_a_width_is_drawn():
    weighted = sampler("uniform", width_weights=[1, 0, 3])
    counts = Counter(weighted.plan(step, 0).widths[0] for step in range(800))
    assert set(counts) == {8, 32} and abs(counts[32] - 600) < 60
    mixed = sampler("per_layer", width_weights=[1, 0, 3], uniform_share=0.25)
    plans = [mixed.plan(step, 0).widths for step in range(2000)]
    assert abs(sum(widths.count(32) for widths in plans) / 8000 - 0.75) < 0.03
    # of four independent draws, 0.25^4 + 0.75^4 are alike by themselves
    alike = sum(len(set(widths)) == 1 for widths in plans) / 2000
    assert abs(alike - (0.25 + 0.75 * (0.25**4 + 0.75**4))) < 0.04


def test_what_is_off_draws_what_it_drew_before():
    """Runs of earlier versions go on with the plans that they began with."""
    assert [sampler("uniform").plan(step, 0).widths[0] for step in range(8)] == [8, 16, 8, 8, 32, 16, 16, 16]
    assert [plan.widths for plan in (sampler("per_layer").plan(step, 0) for step in range(2))] == [
        (8, 32, 16, 32),
        (16, 32, 8, 8),
    ]


STAGES = [ElasticStage(until=0.25, width_sampling="full"), ElasticStage(width_sampling="uniform", exit_fraction=0.5)]


def test_stages_follow_each_other():
    shape = sampler("per_layer").model
    elastic = ElasticConfig(width_sampling="per_layer", schedule=STAGES)
    mine = PlanSampler(shape, elastic, 5, steps=400)
    plans = [mine.plan(step, 0) for step in range(400)]
    assert {plan.widths for plan in plans[:100]} == {(32,) * 4} and {plan.exit_layer for plan in plans[:100]} == {4}
    assert {plan.widths for plan in plans[100:]} == {(width,) * 4 for width in WIDTHS}
    early = sum(plan.exit_layer < 4 for plan in plans[100:]) / 300
    assert abs(early - 0.5) < 0.1 and mine.exit_fraction == 0.5
    # a run that is made longer goes on with the last stage; a stage may end at a step
    assert mine.stage_at(10**9) == 1
    steps = [ElasticStage(until=7, width_sampling="full"), ElasticStage(until=9), ElasticStage(width_sampling="full")]
    numbers = PlanSampler(shape, ElasticConfig(width_sampling="uniform", schedule=steps), 5)
    assert [numbers.stage_at(step) for step in range(11)] == [0] * 7 + [1] * 2 + [2] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width_weights": [1, 2]}, "--elastic.width_weights [1, 2]: 2 for the 3 widths"),
        ({"width_weights": [0, 0, 0]}, "must be 0 or more each, and above 0 together"),
        ({"width_weights": [1, float("nan"), 1]}, "must be 0 or more each"),
        ({"schedule": [ElasticStage(), ElasticStage()]}, "stage 1: until is missing"),
        ({"schedule": [ElasticStage(until=-1), ElasticStage()]}, "until -1: must be above 0"),
        (
            {"schedule": [ElasticStage(until=50), ElasticStage(until=0.2)]},
            "ends at step 20 of 100, and the stage before",
        ),
        ({"schedule": [ElasticStage(width_sampling="sandwich")]}, "the number of passes of a micro-batch is the same"),
        ({"schedule": [ElasticStage(width_sampling="some")]}, "stage 1: width_sampling some"),
        ({"schedule": [ElasticStage(width_weights=[1, 1])]}, "2 for the 3 widths"),
        ({"schedule": [ElasticStage(exit_fraction=2)]}, "stage 1: exit_fraction 2"),
        ({"uniform_share": 2}, "--elastic.uniform_share 2"),
    ],
)
def test_schedules_that_cannot_be(settings, words):
    shape = sampler("per_layer").model
    with pytest.raises(ConfigError) as error:
        elastic = ElasticConfig(width_sampling="per_layer", **settings)
        elastic.check()
        PlanSampler(shape, elastic, 5, steps=100)
    assert words in str(error.value)


def test_another_seed_or_step_draws_anew():
    base = [sampler("per_layer").plan(step, 0) for step in range(50)]
    assert base == [sampler("per_layer").plan(step, 0) for step in range(50)]
    assert base != [sampler("per_layer", seed=6).plan(step, 0) for step in range(50)]
    assert base != [sampler("per_layer").plan(step, 1) for step in range(50)]


def test_exits_only_where_they_are_trained():
    never = [sampler("per_layer").plan(step, 0) for step in range(100)]
    assert all(plan.exit_layer == 4 for plan in never)
    shape, elastic = sampler("per_layer").model, ElasticConfig(width_sampling="per_layer")
    plans = [PlanSampler(shape, elastic, 5, phase=2).plan(step, 0) for step in range(2000)]
    early = [plan.exit_layer for plan in plans if plan.exit_layer < 4]
    assert abs(len(early) / 2000 - 0.3) < 0.04 and set(early) == {1, 2, 3}
    assert [plan.widths for plan in plans[:100]] == [plan.widths for plan in never], "widths stay what they were"
    assert all(PlanSampler(shape, elastic, 5, phase=1).plan(step, 0).exit_layer == 4 for step in range(50))


def test_a_sandwich_leaves_in_its_later_passes_half_of_them_at_full_width():
    mine = sampler("sandwich", exit_fraction=0.5, min_exit_layer=2, sandwich_passes=2)
    plans = [mine.plan(step, number) for step in range(1000) for number in (0, 1)]
    assert all(plan.exit_layer == 4 for plan in plans[::2])
    early = [plan for plan in plans[1::2] if plan.exit_layer < 4]
    assert abs(len(early) / 1000 - 0.5) < 0.05 and {plan.exit_layer for plan in early} == {2, 3}
    wide = sum(plan.widths == (32,) * 4 for plan in early) / len(early)
    assert abs(wide - 0.5) < 0.08


def test_some_plans_let_tokens_leave_earlier_still():
    mine = sampler("sandwich", exit_fraction=0.5, min_exit_layer=2, mixed_exit_fraction=0.4)
    plans = [mine.plan(step, number) for step in range(2000) for number in (0, 1)]
    mixed = [plan for plan in plans if plan.mixed is not None]
    assert abs(len(mixed) / 2000 - 0.2) < 0.03 and all(plan.whole_depth for plan in plans[::2])
    assert {(plan.mixed.layer, plan.exit_layer) for plan in mixed} == {(2, 3), (2, 4), (3, 4)}
    assert not any(plan.whole_depth for plan in mixed) and len({plan.mixed.key for plan in mixed}) == len(mixed)
    cpu = torch.device("cpu")
    for plan in mixed[:20]:
        gone = plan.mixed.positions(4000, cpu)
        assert abs(gone.float().mean() - plan.mixed.share) < 0.04
        # a prefix of the same positions whatever the length
        assert torch.equal(gone[:50], plan.mixed.positions(50, cpu))
    before = sampler("sandwich", exit_fraction=0.5, min_exit_layer=2)
    widths = [before.plan(step, number).widths for step in range(2000) for number in (0, 1)]
    assert [plan.widths for plan in plans] == widths


def test_exits_of_a_full_run():
    mine = sampler("full", exit_fraction=1.0)
    assert {mine.plan(step, 0).exit_layer for step in range(50)} == {1, 2, 3}
    assert {mine.plan(step, 0).widths for step in range(50)} == {(32,) * 4}


@pytest.mark.parametrize("layer", [4, 9])
def test_an_exit_behind_the_last_block_is_refused(layer):
    with pytest.raises(ConfigError, match=f"--elastic.min_exit_layer {layer}: must leave a layer out .* try 2"):
        sampler("per_layer", exit_fraction=0.5, min_exit_layer=layer)
