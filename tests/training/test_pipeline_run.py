"""Whole runs over pipeline stages: the metrics of one process, phases, steps that are not finite."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training.runs import ROOT, arguments, losses, train, write_corpus

FP32 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_those_of_one_process(data, tmp_path):
    """Losses by pass, loads of experts of both stages, evaluation of widths and exits."""
    shape = {"model__block_pattern": "EM|EM", "model__num_experts": 4, "model__experts_per_token": 2}
    shape |= {"model__router_balance_weight": 0.02, "train__steps": 4, "elastic__width_sampling": "sandwich"}
    shape |= {"elastic__exit_fraction": 0.5, "checkpoint__interval": 0}
    runs = {}
    for name, ranks, extra in (("alone", 1, {}), ("stages", 2, {"parallel__pp": 2})):
        run = tmp_path / name
        done = train(ranks, [*arguments(data, run, **shape, **extra), *FP32])
        runs[name] = records(run)
    assert (
        "2 x pipeline parallel" in done.stdout and "pipeline   1f1b, blocks embedding, 0-1 | 2-3, head" in done.stdout
    )
    assert len(runs["alone"]) == len(runs["stages"]) > 4
    for one, other in zip(runs["alone"], runs["stages"]):
        assert one.keys() == other.keys()
        for key in ("loss", "loss_full", "grad_norm", "eval_nats_per_token"):
            if key in one:
                assert one[key] == pytest.approx(other[key], abs=1e-5, rel=1e-5), key
        if "expert_load" in one:
            assert one["expert_load"].keys() == other["expert_load"].keys() == {"0", "2"}
            assert one["expert_load"] == other["expert_load"]


def test_phases_in_stages_with_nothing_to_train(data, tmp_path):
    """Phase 1 in stages of T alone and of M alone, phase 2 on one process from the checkpoint of that."""
    run = tmp_path / "run"
    shape = {"model__block_pattern": "TT|MM", "elastic__plans_per_step": 1}
    first = {"train__phase": 1, "train__steps": 5, "parallel__pp": 2, "elastic__width_sampling": "full"}
    train(2, [*arguments(data, run, **shape, **first), "--checkpoint.init_from", str(_born(data, tmp_path))])
    before, after = (
        load_file(folder / "model-00001-of-00001.safetensors") for folder in (_born(data, tmp_path), run / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mixer" in name for name in changed)
    done = train(1, [*arguments(data, run, **shape, train__phase=2, train__steps=8), "--resume", "auto"])
    assert "phase 1 -> phase 2: now trains" in done.stdout and len(losses(run)) == 8


def _born(data, folder):
    """A model that a step has made, to start from."""
    run = folder / "born"
    if not run.exists():
        train(1, arguments(data, run, model__block_pattern="TTMM", train__steps=1))
    return run / "model"


def test_a_step_that_is_not_finite_is_left_out_on_every_stage(data, tmp_path):
    """A learning rate that ends in infinity: the run stops and names a tensor, whichever stage holds it."""
    words = arguments(data, tmp_path / "run", model__block_pattern="TMTM", parallel__pp=2, optimizer__lr=1e30)
    done = train(2, [*words, "--train.nonfinite_patience", "2", *FP32], check=False)
    assert done.returncode == 7, done.stderr[-2000:]
    assert "first bad tensor: " in done.stderr
