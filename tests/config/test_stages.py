"""Where pipelines are cut: by cost, by count, or where the pattern says."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.pattern import parse_cuts, parse_pattern
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import (
    StagePlan,
    balanced_bounds,
    block_costs,
    equal_bounds,
    num_chunks,
    plan_stages,
    specs_held,
)
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import ParallelConfig
from megatron_adamba.errors import ConfigError


def rank_costs(costs, bounds, pp, schedule) -> list[float]:
    plan = StagePlan(pp, schedule, bounds)
    return [sum(sum(costs[chunk.first : chunk.last]) for chunk in plan.chunks_of(rank)) for rank in range(pp)]


@pytest.mark.parametrize(
    ("pp", "schedule"), [(1, "1f1b"), (2, "1f1b"), (3, "1f1b"), (2, "dualpipev"), (3, "dualpipev")]
)
def test_no_cut_is_better(pp, schedule):
    """Against all cuts there are."""
    source, parts = random.Random(pp), num_chunks(pp, schedule)
    for count in range(parts, 9):
        costs = [source.choice([1.0, 2.0, 5.0, 0.5]) for _ in range(count)]
        bounds = balanced_bounds(costs, pp, schedule)
        assert (
            len(bounds) == parts + 1 and (bounds[0], bounds[-1]) == (0, count) and list(bounds) == sorted(set(bounds))
        )
        cuts = itertools.combinations(range(1, count), parts - 1)
        best = min(max(rank_costs(costs, (0, *cut, count), pp, schedule)) for cut in cuts)
        assert max(rank_costs(costs, bounds, pp, schedule)) == best


def test_deep_models_are_cut_quickly():
    assert len(balanced_bounds([1.0] * 64, 16, "1f1b")) == 17
    assert len(balanced_bounds([1.0] * 64, 8, "dualpipev")) == 17


def test_equal_counts():
    assert equal_bounds(8, 4) == (0, 2, 4, 6, 8) and equal_bounds(5, 3) == (0, 2, 4, 5)


@pytest.mark.parametrize(
    ("pattern", "letters", "cuts"),
    [
        ("TMTM", "TMTM", None),
        ("TMTM|TMTM", "TMTMTMTM", (0, 4, 8)),
        ("(TM|)x2 T", "TMTMT", (0, 2, 4, 5)),
        (["transformer", "|", "mamba", "M"], "TMM", (0, 1, 3)),
    ],
)
def test_patterns_say_where(pattern, letters, cuts):
    assert "".join(parse_pattern(pattern, None)) == letters and parse_cuts(pattern) == cuts


@pytest.mark.parametrize("pattern", ["|TM", "TM|", "T||M"])
def test_a_part_without_a_block_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"a \| without a block on each side; for example"):
        parse_cuts(pattern)


def small(pattern="TMTM", **changes) -> ModelConfig:
    return resolve_model(ModelConfig(hidden_size=64, block_pattern=pattern, vocab_size=4096, head_dim=16, **changes))


def test_the_head_counts():
    """A head as dear as several blocks makes the last stage shorter."""
    costs = block_costs(small("TTTTTT"), 64)
    assert len(set(costs[:-1])) == 1 and costs[-1] == costs[0] + 2 * 64 * 4096
    plan = plan_stages(small("TTTTTT"), ParallelConfig(pp=2), 64)
    assert plan.bounds[1] > 3
    assert plan_stages(small("TTTTTT"), ParallelConfig(pp=2, stage_split="layers"), 64).bounds == (0, 3, 6)


def test_bounds_that_do_not_fit():
    with pytest.raises(
        ConfigError, match=r"has 3 parts between \|, and --parallel.pp 2 with 1f1b runs 2 chunks; write 1"
    ):
        plan_stages(small(), ParallelConfig(pp=2, stage_bounds=[0, 1, 2, 4]), 64)
    with pytest.raises(ConfigError, match=r"must ascend from 0 to 4; try \[0, 2, 4\]"):
        plan_stages(small(), ParallelConfig(pp=2, stage_bounds=[0, 5, 4]), 64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "schedule"), [(1, "1f1b"), (4, "1f1b"), (2, "dualpipev")])
def test_every_parameter_has_a_stage(tied, pp, schedule):
    config = small(tie_embeddings=tied)
    plan = plan_stages(config, ParallelConfig(pp=pp, pipeline_schedule=schedule), 64)
    held = [spec.name for rank in range(pp) for spec in specs_held(manifest(config), plan.chunks_of(rank), tied)]
    twice = {name for name in held if held.count(name) > 1}
    assert set(held) == {spec.name for spec in manifest(config)}
    assert twice == ({"embedding.weight"} if tied and schedule == "1f1b" and pp > 1 else set())
    assert plan.loss_rank == (0 if schedule == "dualpipev" else pp - 1)
