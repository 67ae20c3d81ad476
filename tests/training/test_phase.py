"""Phase 1 trains Mamba layers and leaves everything else as it was."""

from __future__ import annotations

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
