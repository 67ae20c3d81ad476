"""Starting from a canonical checkpoint: the very weights, at any layout, and nothing silently else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training.runs import ROOT, arguments, losses, train, write_corpus

SHAPE = {"model__block_pattern": "EM", "model__num_experts": 4, "model__experts_per_token": 2}
SHAPE |= {"model__mamba_num_groups": 2, "elastic__plans_per_step": 1, "checkpoint__interval": 0}
ALL_BUT_GAINS = "[embedding,head,norm,attention,mlp,router,expert,mamba]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """The model that a run of three steps left."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(1, arguments(data, run, **SHAPE, train__steps=3, train__seed=5))
    return run / "model"


def from_base(base, data, run, **overrides) -> list[str]:
    """Words of a run that gives no setting of the model: all come from the checkpoint."""
    words = arguments(data, run, **{"checkpoint__interval": 0, "elastic__plans_per_step": 1, **overrides})
    kept = []
    for flag, value in zip(words[::2], words[1::2]):
        if not flag.startswith("--model.") and flag != "--data.tokenizer":
            kept += [flag, value]
    return [*kept, "--checkpoint.init_from", str(base)]


def weights(model):
    return load_file(model / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("ranks", "settings", "ds_config"),
    [
        (1, {}, "zero1_fp32.json"),
        (2, {"parallel__tp": 2, "parallel__ep": 2}, "zero2_fp32.json"),
        (2, {"parallel__ep": 2}, "zero3_fp32.json"),
        (1, {}, "zero1.json"),
        (2, {"parallel__tp": 2, "parallel__ep": 2}, "zero2.json"),
        (2, {"parallel__ep": 2}, "zero3.json"),
        (2, {}, "zero3_offload.json"),
    ],
)
def test_every_layout_starts_from_the_same_weights(tmp_path, data, base, ranks, settings, ds_config):
    """A step that trains gains alone leaves the rest as it was, to the last bit."""
    run = tmp_path / "run"
    words = from_base(base, data, run, train__steps=1, train__freeze=ALL_BUT_GAINS, **settings)
    done = train(ranks, [*words, "--deepspeed_config", str(ROOT / "ds_configs" / ds_config)])
    assert "weights of" in " ".join(done.stdout.split())
    before, after = weights(base), weights(run / "model")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert {name for name in before if ".gain" not in name} <= same
    assert (
        json.loads((run / "model" / "config.json").read_text())["model"]
        == (json.loads((base / "config.json").read_text())["model"])
    )


@pytest.mark.parametrize(("first", "second"), [("zero1.json", "zero3.json"), ("zero3.json", "zero2.json")])
def test_frozen_weights_stay_fp32_in_bf16_runs_that_go_on(tmp_path, data, base, first, second):
    """What bf16 would round is saved as it was read, by a run that goes on elsewhere too."""
    run, before = tmp_path / "run", weights(base)
    for steps, ranks, ds_config in ((1, 2, first), (2, 1, second), (3, 2, second)):
        words = from_base(base, data, run, train__steps=steps, train__freeze=ALL_BUT_GAINS)
        train(ranks, [*words, "--resume", "auto", "--deepspeed_config", str(ROOT / "ds_configs" / ds_config)])
    after = weights(run / "model")
    frozen = [name for name in before if ".gain" not in name]
    assert any(not torch.equal(before[name].bfloat16().float(), before[name]) for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_run_that_goes_on_does_not_start_again(tmp_path, data, base):
    run = tmp_path / "run"
    options = {"checkpoint__interval": 2, "logging__interval": 1}
    train(1, [*from_base(base, data, run, train__steps=4, **options), "--resume", "auto"])
    whole = losses(run)
    (run / "checkpoints" / "latest").write_text("step-00000002")
    done = train(1, [*from_base(base, data, run, train__steps=4, **options), "--resume", "auto"])
    assert "at step 2" in done.stdout and losses(run) == whole


def refused(words, code, *fragments):
    done = train(1, words, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(fragment in line for fragment in fragments), line


def test_another_model_is_refused(tmp_path, data, base):
    words = from_base(base, data, tmp_path / "run")
    refused([*words, "--model.expert_ffn_size", "64"], 2, "--checkpoint.init_from", "blocks.0.", "has shape")
    refused([*words, "--model.block_pattern", "EMM", "--model.num_layers", "3"], 2, "its blocks.2", "has shape none")


def test_what_is_no_model_is_refused(tmp_path, data, base):
    words = from_base(tmp_path / "nothing", data, tmp_path / "run")
    refused(words, 2, "nothing/config.json", "give a folder that holds a checkpoint")
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    shard = broken / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    refused(from_base(broken, data, tmp_path / "run"), 5, shard.name)
    values = json.loads((base / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(values | {"tokenizer_hash": "0" * 64}))
    refused(from_base(broken, data, tmp_path / "run"), 4, "was trained with another tokenizer")
