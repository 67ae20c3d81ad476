"""Ranks as numbers: which ones work together, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adamba.errors import ConfigError
from megatron_adamba.parallel.topology import KINDS, RankGrid, Topology, single_process

DEGREE = st.integers(1, 4)


@st.composite
def grids(draw) -> RankGrid:
    tp, dp, pp = draw(DEGREE), draw(DEGREE), draw(DEGREE)
    ep = draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % n == 0]))
    return RankGrid(tp * dp * pp, tp, pp, ep)


def sizes(grid: RankGrid) -> dict[str, int]:
    return {"dp": grid.dp, "tp": grid.tp, "pp": grid.pp, "ep": grid.ep, "edp": grid.edp, "model": grid.tp * grid.pp}


@given(grids())
def test_groups_of_every_kind_share_out_the_ranks(grid):
    assert grid.dp * grid.tp * grid.pp == grid.world_size
    assert grid.edp * grid.ep == grid.dp * grid.tp
    for kind in KINDS:
        groups = grid.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert {len(group) for group in groups} == {sizes(grid)[kind]}


@given(grids())
def test_tp_is_fastest_and_pp_slowest_and_ep_folds_over_a_stage(grid):
    """Against the ranks laid out in a box, which the places must not be computed from."""
    ranks = torch.arange(grid.world_size)
    box = ranks.view(grid.pp, grid.dp, grid.tp)
    folded = ranks.view(grid.pp, grid.edp, grid.ep)
    along = {
        "tp": box.flatten(0, 1),
        "dp": box.movedim(1, -1).flatten(0, 1),
        "pp": box.movedim(0, -1).flatten(0, 1),
        "ep": folded.flatten(0, 1),
        "edp": folded.movedim(1, -1).flatten(0, 1),
        "model": box.movedim(1, 0).flatten(1),
    }
    for kind, rows in along.items():
        assert sorted(grid.groups(kind)) == sorted(rows.tolist())
    for rank in range(grid.world_size):
        place = grid.places(rank)
        assert box[place["pp"], place["dp"], place["tp"]] == rank
        assert folded[place["pp"], place["edp"], place["ep"]] == rank


@given(grids())
def test_a_rank_finds_itself_in_its_group_at_its_place(grid):
    for rank in range(grid.world_size):
        topology = Topology(grid, rank, {})
        for kind in KINDS:
            (group,) = [group for group in grid.groups(kind) if rank in group]
            assert group.index(rank) == topology.place(kind)
            assert len(group) == topology.size(kind)


@pytest.mark.oracle
@settings(deadline=None)  # the first example pays for the import
@given(grids())
def test_groups_are_those_of_megatron_core(grid):
    """Its expert groups with an expert tensor-parallel degree of 1 are our folded ones."""
    from megatron.core.parallel_state import RankGenerator

    dense = RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=1, order="tp-cp-ep-dp-pp")
    expert = RankGenerator(tp=1, ep=grid.ep, dp=grid.edp, pp=grid.pp, cp=1, order="tp-cp-ep-dp-pp")
    theirs = {"tp": (dense, "tp"), "dp": (dense, "dp"), "pp": (dense, "pp"), "model": (dense, "tp-pp")}
    theirs |= {"ep": (expert, "ep"), "edp": (expert, "dp")}
    for kind, (generator, token) in theirs.items():
        assert sorted(grid.groups(kind)) == sorted(generator.get_ranks(token))


def legal_values(message: str) -> list[int]:
    (listed,) = re.findall(r"one of \[([\d, ]*)\]", message)
    return [int(value) for value in listed.split(",")]


def accepted(world_size: int, **degrees: int) -> bool:
    try:
        RankGrid(world_size, **degrees)
    except ConfigError:
        return False
    return True


@given(st.integers(1, 24), st.integers(1, 9), st.integers(1, 9))
def test_a_refused_degree_is_named_with_all_that_would_do(world_size, tp, pp):
    if accepted(world_size, tp=tp, pp=pp):
        assert world_size % (tp * pp) == 0
        return
    with pytest.raises(ConfigError, match=rf"--parallel.tp {tp} x --parallel.pp {pp}.* {world_size} ranks") as error:
        RankGrid(world_size, tp, pp)
    if world_size % pp:
        assert "--parallel.pp 1" in str(error.value)
        assert accepted(world_size, tp=1, pp=1)
    else:
        works = [n for n in range(1, 30) if accepted(world_size, tp=n, pp=pp)]
        assert legal_values(str(error.value)) == works


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40))
def test_a_refused_expert_degree_is_named_with_all_that_would_do(dp, tp, pp, ep):
    world_size = dp * tp * pp
    if dp * tp % ep == 0:
        assert RankGrid(world_size, tp, pp, ep).edp == dp * tp // ep
        return
    with pytest.raises(ConfigError, match=rf"--parallel.ep {ep}: .*= {dp * tp};") as error:
        RankGrid(world_size, tp, pp, ep)
    works = [n for n in range(1, 40) if accepted(world_size, tp=tp, pp=pp, ep=n)]
    assert legal_values(str(error.value)) == works


def test_a_single_process_needs_nobody():
    topology = single_process()
    for kind in KINDS:
        assert (topology.size(kind), topology.place(kind), topology.group(kind)) == (1, 0, None)
    assert topology.world_size == 1 and not topology.sequence_parallel
