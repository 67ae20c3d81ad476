"""A run that goes on reads its data in the order that it began with, or says that it does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from training.runs import arguments, losses, train

STEADY = {"optimizer__schedule": "constant"}
"""a rate that does not depend on the number of steps"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("begun") / "run"
    train(1, arguments(data, run, train__steps=4, checkpoint__interval=0, **STEADY))
    return run


@pytest.fixture
def run(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def goes_on(data, run, *flags, **overrides):
    words = arguments(data, run, **{"train__steps": 6, "checkpoint__interval": 0, **STEADY, **overrides})
    return train(1, [*words, *flags, "--resume", "auto"], check=False)


def other_documents(data, folder):
    """As many documents and tokens, of which one is another."""
    shutil.copytree(data, folder)
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")
    tokens[5] = tokens[5] % 200 + 1
    tokens.tofile(folder / "train.bin")
    return folder


@pytest.mark.parametrize("change", ["seed", "seq_len", "documents", "blend"])
def test_another_order_is_refused_with_a_way_out(data, run, tmp_path, change):
    options = {
        "seed": {"train__seed": 7},
        "seq_len": {"train__seq_len": 16},
        "documents": {},
        "blend": {"data__train": f"[{data / 'train'}, {data / 'validation'}]"},
    }[change]
    changed = other_documents(data, tmp_path / "other") if change == "documents" else data
    before = (run / "metrics.jsonl").read_bytes()
    done = goes_on(changed, run, **options)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    flag = {"seed": "--train.seed 7", "seq_len": "--train.seq_len 16"}.get(change, "--data.train")
    assert done.returncode == 2 and flag in line and "--data.allow_new_order true" in line
    assert (run / "metrics.jsonl").read_bytes() == before
    done = goes_on(changed, run, "--data.allow_new_order", "true", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "new data order from step 4 on" in done.stdout and sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_a_new_order_begins_at_its_first_sample_and_is_kept(data, run, begun, tmp_path):
    """The step behind the change sees the first batch of the new order, and a later resume goes on in it."""
    first = goes_on(data, run, "--data.allow_new_order", "true", train__seed=7, train__steps=6)
    assert first.returncode == 0
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["counters"]["order_start"] == 32 and state["counters"]["consumed_samples"] == 48
    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    assert goes_on(data, whole, "--data.allow_new_order", "true", train__seed=7, train__steps=8).returncode == 0
    # the flag is no longer needed
    assert goes_on(data, run, train__seed=7, train__steps=8).returncode == 0
    assert losses(run) == losses(whole)


def test_what_touches_no_weight_and_no_order_may_change(data, run):
    changes = {"model__mamba_chunk_size": 8, "model__modes": "{a: 512}", "logging__interval": 2}
    changes |= {"train__micro_batch_size": 4, "elastic__plans_per_step": 1, "train__global_batch_size": 16}
    done = goes_on(data, run, **changes)
    assert done.returncode == 0, done.stderr[-2000:]
    modes = json.loads((run / "model" / "config.json").read_text())["model"]["modes"]
    assert modes == {"a": 512}
    # a copy elsewhere of the same data is the same data
    again = run.with_name("data")
    shutil.copytree(data, again)
    assert goes_on(again, run, train__steps=8).returncode == 0
