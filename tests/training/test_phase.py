"""Phase 1 trains Mamba layers and leaves everything else as it was; phase 2 trains all, exits too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training.runs import ROOT, arguments, train, write_corpus

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.training.freeze import freeze_groups

SHAPE = {"hidden_size": 32, "vocab_size": 20, "head_dim": 8, "num_experts": 4, "ffn_granule": 16, "mamba_head_dim": 8}


def test_only_mamba_mixers_and_their_norms_train():
    config = resolve_model(ModelConfig(block_pattern="EM", mamba_use_mlp=True, **SHAPE))
    model = AdambaModel(config)
    frozen = freeze_groups(model, manifest(config), [], phase=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if name.startswith("blocks.1.mixer")}
    assert "blocks.1.mixer_norm.weight" in trained and "blocks.1.mlp.up.up_weight" not in trained
    assert frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_a_model_without_mamba_has_no_phase_1():
    config = resolve_model(ModelConfig(block_pattern="E", **SHAPE))
    with pytest.raises(ConfigError, match=r"--train\.phase 1: trains Mamba layers, and this model has none"):
        freeze_groups(AdambaModel(config), manifest(config), [], phase=1)


@pytest.mark.parametrize("ds_config", ["zero1.json", "zero3.json"])
def test_experts_elsewhere_stay_as_they_are(tmp_path, ds_config):
    """Expert parallelism with experts that do not train, as after grafting."""
    data = write_corpus(tmp_path)
    options = {"model__block_pattern": "EM", "model__num_experts": 4, "model__experts_per_token": 2}
    options |= {"elastic__width_sampling": "full", "elastic__plans_per_step": 1, "train__phase": 1}
    options |= {"checkpoint__interval": 0, "parallel__ep": 2}
    extra = ["--deepspeed_config", str(ROOT / "ds_configs" / ds_config)]
    weights = []
    for steps in (1, 6):
        run = tmp_path / f"run-{steps}"
        train(2, [*arguments(data, run, **options, train__steps=steps, optimizer__warmup_steps=0), *extra])
        weights.append(load_file(run / "model" / "model-00001-of-00001.safetensors"))
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed and all(name.startswith("blocks.1.mixer") for name in changed)


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"parallel__tp": 2, "model__mamba_num_groups": 2})])
def test_phase_2_goes_on_from_phase_1(tmp_path, ranks, layout):
    """The same run in another phase: all trains, plans leave early, exits are evaluated, and it says what it kept."""
    data, run = write_corpus(tmp_path), tmp_path / "run"
    options = {"model__block_pattern": "TMT", "elastic__plans_per_step": 1, **layout}
    first = arguments(data, run, **options, train__phase=1, train__steps=10, elastic__width_sampling="full")
    train(ranks, first)
    before = load_file(run / "model" / "model-00001-of-00001.safetensors")
    second = arguments(data, run, **options, train__phase=2, train__steps=30, elastic__exit_fraction=0.6)
    done = train(ranks, [*second, "--resume", "auto"])
    said = " ".join(done.stdout.split())
    assert "phase 1 -> phase 2: now trains" in said and "(embedding, head, norm, gain, attention, mlp)" in said
    assert (
        "optimizer state kept: " in said and "optimizer state reset: " in said and "optimizer state dropped" not in said
    )
    assert "resumed from" in said and "at step 10" in said
    after = load_file(run / "model" / "model-00001-of-00001.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("_weight"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    early = [record for record in records if "loss" in record and "@" in record["width"]]
    assert all(record["step"] > 10 for record in early) and 5 <= len(early) < 20
    exits = [record["eval_exit"] for record in records if "eval_exit" in record]
    assert exits == [1, 2] and "blocks" in done.stdout
