"""A checkpoint of any layout is that of every other, and loads into it."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from distributed.checkpoint_jobs import STEPS, canonical_value
from distributed.grids import slow
from distributed.test_loss_curve import reference

from megatron_adamba.checkpoint.dcp_json import read_metadata
from megatron_adamba.checkpoint.training import checkpoint_name, read_state, verify_files
from megatron_adamba.errors import CheckpointError

SETUP = {
    "arguments": {
        "pattern": "TMT",
        "mamba_version": 2,
        "sampling": "per_layer",
        "mamba_num_groups": 4,
        "activation": "swiglu",
    },
    "freeze": ["norm"],
}
MAMBA1 = {
    "arguments": {"pattern": "MT", "mamba_version": 1, "sampling": "sandwich", "tie_embeddings": True},
    "freeze": [],
}
MOE = {
    "arguments": {
        "pattern": "EM",
        "mamba_num_groups": 2,
        "num_experts": 4,
        "experts_per_token": 2,
        "router_balance_weight": 0.05,
        "attention_sinks": True,
        "plans_per_step": 1,
    },
    "freeze": ["norm"],
}
MUON = {"arguments": SETUP["arguments"] | {"optimizer": "muon"}, "freeze": []}
SHAPES = {
    "1": (1, {}),
    "TP2": (2, {"tp": 2}),
    "TP4": (4, {"tp": 4}),
    "TP2xDP2": (4, {"tp": 2}),
    "DP4": (4, {}),
    "TP2+SP": (2, {"tp": 2, "sp": True}),
}
LAYOUTS = {
    f"{name} ZeRO {stage}": (ranks, {"stage": stage, **options})
    for name, (ranks, options) in SHAPES.items()
    for stage in (1, 2, 3)
}
PAIRS = [(one, other) for one in LAYOUTS for other in LAYOUTS if one != other]
FEW = [
    ("TP2 ZeRO 1", "1 ZeRO 3"),
    ("TP2xDP2 ZeRO 3", "TP2+SP ZeRO 2"),
    ("1 ZeRO 2", "TP2xDP2 ZeRO 1"),
]
WIDE = [pair for pair in random.Random(4).sample(PAIRS, 60) if pair not in FEW]


def zero_2_slow(layouts):
    """ZeRO 2 keeps its state as ZeRO 1 does: it is among the slow ones."""
    return [slow(name) if name.endswith("ZeRO 2") else name for name in layouts]


@pytest.fixture(scope="module")
def random_state(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    workers(1).run("checkpoint_jobs", "write_reference", setup=SETUP, folder=str(folder))
    return folder / checkpoint_name(STEPS)


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, put together from its rectangles by hand; each element must be there exactly once."""
    tensors = {}
    for name, entry in json.loads((folder / "metadata.json").read_text())["tensors"].items():
        whole, times = torch.empty(entry["shape"]), torch.zeros(entry["shape"], dtype=torch.int8)
        for chunk in entry["chunks"]:
            with open(folder / chunk["file"], "rb") as stream:
                stream.seek(chunk["start"])
                values = torch.load(io.BytesIO(stream.read(chunk["length"])), weights_only=True)
            place = tuple(slice(low, low + size) for low, size in zip(chunk["offset"], chunk["size"]))
            whole[place] = values
            times[place] += 1
        assert (times == 1).all(), name
        tensors[name] = whole
    return tensors


@pytest.mark.parametrize("name", zero_2_slow(LAYOUTS))
def test_every_layout_loads_and_saves_the_same(workers, random_state, tmp_path, name):
    loads_and_saves(workers, random_state, tmp_path, SETUP, *LAYOUTS[name])


def loads_and_saves(workers, random_state, tmp_path, setup, ranks, layout):
    arguments = {"setup": setup, "layout": layout, "source": str(random_state), "folder": str(tmp_path)}
    for wrong in workers(ranks).run("checkpoint_jobs", "load_and_save", **arguments):
        assert wrong == []
    saved = tmp_path / checkpoint_name(STEPS)
    verify_files(saved)
    assert set(read_metadata(saved).state_dict_metadata) == set(read_metadata(random_state).state_dict_metadata)
    tensors = whole_tensors(saved)
    assert any(key.startswith("exp_avg_sq/") for key in tensors)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, canonical_value(key, tuple(tensor.shape))), key


class Trap:
    """A pickle that, executed, leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("victim", ["chunk", "metadata.json", "state.json", "files.json", ".metadata"])
def test_no_pickle_is_executed(workers, random_state, tmp_path, victim, kind):
    """In the place of a tensor, with the length and checksum that the lists ask for, and in the place of each list."""
    folder, sprung, control = tmp_path / "trapped", tmp_path / "sprung", tmp_path / "control"
    pickle.loads(pickle.dumps(Trap(control))).close()
    assert control.exists(), "the trap works where pickles are executed"
    shutil.copytree(random_state, folder)
    stream = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Trap(sprung), stream)
    else:
        torch.save(Trap(sprung), stream)
    payload = stream.getvalue()
    if victim == "chunk":
        metadata = json.loads((folder / "metadata.json").read_text())
        for entry in metadata["tensors"].values():
            for chunk in entry["chunks"]:
                chunk |= {"file": "trap.distcp", "start": 0, "length": len(payload)}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        (folder / "trap.distcp").write_bytes(payload)
    else:
        (folder / victim).write_bytes(payload)
    arguments = {"setup": SETUP, "layout": {"stage": 1}, "source": str(folder), "folder": str(tmp_path / "out")}
    if victim == "chunk" or victim == "metadata.json":
        with pytest.raises(RuntimeError, match="CheckpointError"):
            workers(1).run("checkpoint_jobs", "load_and_save", **arguments)
    elif victim == ".metadata":
        assert workers(1).run("checkpoint_jobs", "load_and_save", **arguments) == [[]]
    else:
        with pytest.raises(CheckpointError, match=victim):
            verify_files(folder)
            read_state(folder)
    assert not sprung.exists()


def goes_on(workers, folder, setup, one, other, expected):
    ranks, layout = one
    job = {"setup": setup, "layout": layout, "folder": str(folder)}
    first = workers(ranks).run("checkpoint_jobs", "train_and_save", **job)[0]
    ranks, layout = other
    job = {"setup": setup, "layout": layout, "source": str(folder / checkpoint_name(STEPS))}
    second = workers(ranks).run("checkpoint_jobs", "load_and_train", **job)[0]
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(first + second, expected, strict=True)):
        assert abs(loss - wanted) < 1e-5, f"step {step}: loss {loss} for {wanted}"
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm, f"step {step}: norm {norm} for {wanted_norm}"


EXPERT_LAYOUTS = {
    f"{name} ZeRO {stage}": (ranks, {"stage": stage, **options})
    for name, (ranks, options) in {
        "1": (1, {}),
        "DP2": (2, {}),
        "EP2": (2, {"ep": 2}),
        "EP2xTP2": (2, {"ep": 2, "tp": 2}),
        "EP2xDP2": (4, {"ep": 2}),
        "EP4": (4, {"ep": 4}),
        "EP2xTP2xDP2": (4, {"ep": 2, "tp": 2}),
    }.items()
    for stage in (1, 2, 3)
}


@pytest.fixture(scope="module")
def random_experts(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    workers(1).run("checkpoint_jobs", "write_reference", setup=MOE, folder=str(folder))
    return folder / checkpoint_name(STEPS)


@pytest.mark.parametrize("name", zero_2_slow(EXPERT_LAYOUTS))
def test_every_layout_of_experts_loads_and_saves_the_same(workers, random_experts, tmp_path, name):
    loads_and_saves(workers, random_experts, tmp_path, MOE, *EXPERT_LAYOUTS[name])


@pytest.mark.parametrize(
    ("one", "other"),
    [("EP2 ZeRO 1", "1 ZeRO 3"), ("DP2 ZeRO 3", "EP4 ZeRO 2"), ("EP2xTP2 ZeRO 3", "EP2xDP2 ZeRO 1")],
)
def test_experts_go_on_elsewhere(workers, tmp_path, one, other):
    goes_on(workers, tmp_path, MOE, EXPERT_LAYOUTS[one], EXPERT_LAYOUTS[other], uninterrupted(MOE))


def uninterrupted(setup):
    return reference(json.dumps(setup["arguments"]), json.dumps(setup["freeze"]))


@pytest.mark.parametrize(("one", "other"), [*FEW, slow("DP4 ZeRO 3", "TP4 ZeRO 1")])
def test_training_goes_on_elsewhere(workers, tmp_path, one, other):
    goes_on(workers, tmp_path, SETUP, LAYOUTS[one], LAYOUTS[other], uninterrupted(SETUP))


@pytest.mark.parametrize(("one", "other"), [("TP2+SP ZeRO 3", "1 ZeRO 1"), slow("1 ZeRO 2", "TP4 ZeRO 2")])
def test_mamba1_and_tied_ends_go_on_elsewhere(workers, tmp_path, one, other):
    goes_on(workers, tmp_path, MAMBA1, LAYOUTS[one], LAYOUTS[other], uninterrupted(MAMBA1))


@pytest.mark.parametrize(("one", "other"), [("TP2 ZeRO 2", "TP2xDP2 ZeRO 1"), slow("DP4 ZeRO 1", "TP4 ZeRO 1")])
def test_muon_goes_on_elsewhere(workers, tmp_path, one, other):
    expected = workers(1).run("curve", "engine_curve", arguments=MUON["arguments"], stage=0)[0]
    goes_on(workers, tmp_path, MUON, LAYOUTS[one], LAYOUTS[other], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), WIDE)
def test_training_goes_on_elsewhere_wide(workers, tmp_path, one, other):
    goes_on(workers, tmp_path, SETUP, LAYOUTS[one], LAYOUTS[other], uninterrupted(SETUP))
