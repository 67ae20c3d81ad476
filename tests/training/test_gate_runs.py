"""Gates in real runs: they stop and go on with their run, on other layouts too, and begin where there were none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.runs import ROOT, arguments, losses, train, write_corpus
from training.test_resume import forget_after

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.inference.load import load_model

GATED = {
    "train__phase": 2,
    "model__block_pattern": "TMTM",
    "model__mamba_num_groups": 2,
    "elastic__width_sampling": "sandwich",
    "elastic__plans_per_step": 1,
    "gates__warmup_steps": 2,
    "gates__size": 8,
    "gates__positions": 6,
    "train__steps": 8,
    "train__eval_interval": 100,
    "checkpoint__interval": 4,
}
FP32 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """Eight steps without a stop."""
    run = tmp_path_factory.mktemp("whole")
    train(1, arguments(data, run, **GATED) + FP32)
    return run


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(run / "model"))


def test_gates_learn_from_their_warm_up_on(whole):
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    errors = [record["step"] for record in records if "gate_error" in record]
    assert errors == [3, 4, 5, 6, 7, 8]
    loaded = load_model(whole / "model", "fp32")
    assert loaded.gates is not None and loaded.min_exit_layer == 1 and loaded.gate_config.predictor == "relative"
    moved = [name for name, value in tensors_of(whole).items() if name.endswith("confidence_gate.down.weight")]
    assert len(moved) == 3 and all(tensors_of(whole)[name].abs().max() > 0 for name in moved)


@pytest.mark.parametrize(
    ("ranks", "layout", "exact"),
    [
        (1, {}, True),
        (2, {"parallel__tp": 2}, False),
        (2, {"parallel__pp": 2}, False),
    ],
    ids=["alone", "tensor parallel", "pipeline"],
)
def test_a_stopped_run_goes_on(tmp_path, data, whole, ranks, layout, exact):
    """From step 4, alone or elsewhere: the same losses, gates and estimator."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    forget_after(run, 4)
    done = train(ranks, [*arguments(data, run, **GATED | layout), *FP32, "--resume", "auto"])
    assert "at step 4" in done.stdout
    found, wanted = tensors_of(run), tensors_of(whole)
    names = {spec.name for spec in gate_manifest(load_model(whole / "model").model.config)}
    assert names and names <= found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if exact:
            assert torch.equal(found[name], tensor), name
        elif name in names:
            assert (found[name] - tensor).abs().max() <= 2e-3, name
    for step, loss in losses(whole).items():
        assert abs(losses(run)[step] - loss) <= (0 if exact else 1e-5)


def test_a_model_without_gates_gets_them(tmp_path, data, whole):
    """A run without, and one that goes on from its model with gates; a third carries them on untrained."""
    plain = GATED | {"gates__train": "false", "train__steps": 2}
    train(1, arguments(data, tmp_path / "plain", **plain))
    assert load_model(tmp_path / "plain" / "model").gates is None
    start = ["--checkpoint.init_from", str(tmp_path / "plain" / "model")]
    divergence = {"gates__target": "divergence", "gates__loss": "deviance"}
    words = arguments(data, tmp_path / "gated", **GATED | {"train__steps": 4} | divergence)
    kept = [word for word in _without(words, "--model.") if word]
    train(1, kept + start)
    gated = load_model(tmp_path / "gated" / "model")
    assert gated.gates is not None and gated.reading.target == "divergence"
    records = [json.loads(line) for line in (tmp_path / "gated" / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("gate_error", 0) > 0 for record in records)
    start = ["--checkpoint.init_from", str(whole / "model")]
    changes = {"train__steps": 2, "train__phase": 1, "elastic__width_sampling": "full"}
    train(1, _without(arguments(data, tmp_path / "carried", **GATED | changes), "--model.") + start)
    carried, before = tensors_of(tmp_path / "carried"), tensors_of(whole)
    gates = [name for name in before if "_gate." in name or name.startswith("predictor.")]
    assert gates and all(torch.equal(carried[name], before[name]) for name in gates)
    # and what they were trained for
    loaded = load_model(tmp_path / "carried" / "model")
    assert (loaded.gate_config.predictor, loaded.min_exit_layer) == ("relative", 1)


def test_a_pipeline_goes_past_the_warm_up(tmp_path, data, whole):
    """States travel between stages from the first step on, learned from or not."""
    train(2, [*arguments(data, tmp_path / "run", **GATED, parallel__pp=2), *FP32])
    for step, loss in losses(whole).items():
        assert abs(losses(tmp_path / "run")[step] - loss) <= 1e-5


def test_a_model_made_into_a_checkpoint_goes_on(tmp_path, data, whole):
    """It holds no optimizer state, the gates' neither."""
    tool = [
        sys.executable,
        str(ROOT / "tools" / "checkpoint.py"),
        "convert",
        str(whole / "model"),
        str(tmp_path / "start"),
    ]
    subprocess.run(tool, check=True, capture_output=True)
    words = arguments(data, tmp_path / "run", **GATED | {"train__steps": 3, "gates__warmup_steps": 0})
    train(1, [*words, *FP32, "--resume", str(tmp_path / "start")])
    assert sorted(losses(tmp_path / "run"))[-1] == 3


def test_gates_are_not_left_behind_without_a_word(tmp_path, data, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    forget_after(run, 4)
    without = GATED | {"gates__train": "false"}
    done = train(1, [*arguments(data, run, **without), *FP32, "--resume", "auto"], check=False)
    assert done.returncode == 5 and "holds gates, which this run leaves out; add --model.gate_size 8" in done.stderr
    train(1, [*arguments(data, run, **without, model__gate_size=8), *FP32, "--resume", "auto"])
    name = "blocks.1.confidence_gate.up.weight"
    assert not torch.equal(tensors_of(run)[name], tensors_of(whole)[name])


def _without(words: list[str], prefix: str) -> list[str]:
    """Flags of one section and their values left out."""
    pairs = zip(words[::2], words[1::2])
    return [word for flag, value in pairs if not flag.startswith(prefix) for word in (flag, value)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"elastic__width_sampling": "uniform", "gates__predictor": "relative"},
            "--gates.predictor relative: compares",
        ),
        ({"data__prompt_end": "two"}, "--data.prompt_end 'two': is 3 tokens of this tokenizer"),
        ({"gates__tau": 0}, "--gates.tau 0"),
        (
            {"elastic__exit_fraction": 0, "elastic__min_exit_layer": 4},
            "--elastic.min_exit_layer 4: leaves no layer of 4",
        ),
        ({"gates__target": "exact"}, "--gates.target exact: must be one of relative, signed, divergence, absolute"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, data, settings, message):
    done = train(1, arguments(data, tmp_path, **GATED | settings), check=False)
    assert done.returncode == 2 and message in done.stderr
