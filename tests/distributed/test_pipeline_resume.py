"""A checkpoint knows nothing of pipelines: any number of stages, cut anywhere, resumes any other layout's."""

from __future__ import annotations

import pytest
from distributed.checkpoint_jobs import STEPS
from distributed.grids import slow
from distributed.test_any_to_any import goes_on, loads_and_saves, uninterrupted

from megatron_adamba.checkpoint.training import checkpoint_name

SETUP = {
    "arguments": {
        "pattern": "TMET",
        "mamba_num_groups": 2,
        "num_experts": 4,
        "experts_per_token": 2,
        "router_balance_weight": 0.05,
        "tie_embeddings": True,
        "sampling": "sandwich",
        "exits": 0.5,
    },
    "freeze": ["norm"],
}
MUON = {"arguments": {"pattern": "TMTM", "mamba_num_groups": 2, "optimizer": "muon"}, "freeze": []}
FOLDED = {"pp": 2, "schedule": "dualpipev"}
LAYOUTS = {
    "1": (1, {"stage": 3}),
    "EP2": (2, {"stage": 2, "ep": 2}),
    "PP2": (2, {"stage": 1, "pp": 2}),
    "PP2 cut early": (2, {"stage": 1, "pp": 2, "bounds": [0, 1, 4]}),
    "PP4": (4, {"stage": 1, "pp": 4}),
    "PP2xTP2+SP": (4, {"stage": 1, "pp": 2, "tp": 2, "sp": True}),
    "PP2xDP2": (4, {"stage": 1, "pp": 2}),
    "PP2xEP2": (4, {"stage": 1, "pp": 2, "ep": 2}),
    "DualPipeV": (2, {"stage": 1, **FOLDED}),
    "DualPipeVxTP2": (4, {"stage": 1, "tp": 2, **FOLDED}),
}


@pytest.fixture(scope="module")
def random_state(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    workers(1).run("checkpoint_jobs", "write_reference", setup=SETUP, folder=str(folder))
    return folder / checkpoint_name(STEPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_and_saves_the_same(workers, random_state, tmp_path, name):
    loads_and_saves(workers, random_state, tmp_path, SETUP, *LAYOUTS[name])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("PP2", "1"),
        ("PP2", "PP2 cut early"),
        ("EP2", "PP2xTP2+SP"),
        ("PP2xEP2", "DualPipeV"),
        slow("DualPipeV", "PP4"),
        slow("1", "PP4"),
        slow("PP2xDP2", "EP2"),
        slow("DualPipeVxTP2", "PP2xDP2"),
        slow("PP4", "DualPipeVxTP2"),
    ],
)
def test_training_goes_on_elsewhere(workers, tmp_path, one, other):
    goes_on(workers, tmp_path, SETUP, LAYOUTS[one], LAYOUTS[other], uninterrupted(SETUP))


@pytest.mark.parametrize(("one", "other"), [("PP2", "1"), slow("PP2xTP2", "PP4")])
def test_muon_goes_on_elsewhere(workers, tmp_path, one, other):
    layouts = LAYOUTS | {"1": (1, {"stage": 2}), "PP2xTP2": (4, {"stage": 1, "pp": 2, "tp": 2})}
    expected = workers(1).run("curve", "engine_curve", arguments=MUON["arguments"], stage=0)[0]
    goes_on(workers, tmp_path, MUON, layouts[one], layouts[other], expected)
