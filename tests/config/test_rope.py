"""YaRN's settings: the frequencies are transformers' own wherever a config is taken, and what differs is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch
from surgery.gpt_oss_folders import make_source
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_adamba.config.model import ModelConfig
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.layers.rope import yarn_of
from megatron_adamba.ops.rotary import rotary_table
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss

pytestmark = pytest.mark.oracle


def config_of(head_dim: int = 64, **rope) -> ModelConfig:
    settings = {"rope_theta": 150000.0, "rope_factor": 32.0, "rope_original_context": 4096}
    return ModelConfig(hidden_size=head_dim, head_dim=head_dim, **{**settings, **rope})


def their_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    rope = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.rope_factor,
        "beta_fast": config.rope_beta_fast,
        "beta_slow": config.rope_beta_slow,
        "truncate": False,
        "original_max_position_embeddings": config.rope_original_context,
    }
    theirs = GptOssConfig(head_dim=config.head_dim, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")


def test_a_thousand_random_settings():
    """Each is refused, or the same to the last digits; some of both."""
    random_, taken = random.Random(21), 0
    for _ in range(1000):
        config = config_of(
            random_.choice([2, 8, 16, 64, 128]),
            rope_theta=random_.choice([1.5, 2.0, 10.0, 500.0, 1e4, 1.5e5]),
            rope_factor=random_.choice([1.5, 8.0, 32.0]),
            rope_original_context=random_.choice([1, 2, 6, 7, 16, 100, 4096, 10**6]),
            rope_beta_fast=random_.choice([0.5, 1.0, 4.0, 32.0]),
            rope_beta_slow=random_.choice([0.25, 1.0, 4.0, 32.0]),
        )
        try:
            config.check()
        except ConfigError:
            continue
        taken += 1
        wanted, concentration = their_frequencies(config)
        yarn = yarn_of(config)
        _, sin = rotary_table(torch.tensor([1e-3]), config.head_dim, config.rope_theta, 1, yarn)
        assert torch.allclose(sin[0], (wanted * 1e-3).sin(), rtol=1e-5, atol=0), config
        assert yarn.concentration == pytest.approx(concentration)
    assert 250 < taken < 900


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_beta_fast": 1.0, "rope_beta_slow": 32.0}, "rope_beta_fast 1: must not be below --model.rope_beta_slow"),
        ({"rope_original_context": 1}, "rope_original_context 1: is too short .* must be 7 or more"),
        ({"rope_original_context": 100, "rope_beta_slow": 16.0}, "must be 101 or more"),
        ({"rope_theta": 1.0}, "rope_theta 1: must be above 1 for YaRN"),
        ({"rope_theta": 0.5}, "rope_theta 0.5: must be above 1 for YaRN"),
        ({"rope_theta": 1.01}, "rope_theta 1.01: is too small"),
        ({"rope_theta": float("inf")}, "rope_theta inf: must be above 0 and finite"),
        ({"rope_beta_fast": float("nan")}, "rope_beta_fast nan: must be above 0 and finite"),
        ({"rope_factor": float("inf")}, "rope_factor inf: must lie between 1"),
    ],
    ids=str,
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings).check()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("hf bf16", {"beta_fast": 1.0, "beta_slow": 32.0}, "config.json: .*rope_beta_fast 1: must not be below"),
        ("hf bf16", {"original_max_position_embeddings": 1}, "config.json: .*rope_original_context 1: is too short"),
        ("openai bf16", {"rope_ntk_beta": 1, "rope_ntk_alpha": 32}, "config.json: .*rope_beta_fast 1: must not be"),
        ("openai bf16", {"initial_context_length": 1}, "config.json: .*rope_original_context 1: is too short"),
    ],
    ids=str,
)
def test_what_an_import_refuses(kind, changes, message, tmp_path):
    _, source = make_source("square experts, one key head", kind, tmp_path / "source")
    path = source / "config.json"
    values = json.loads(path.read_text())
    (values["rope_parameters"] if kind.startswith("hf") else values).update(changes)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        import_gpt_oss(source)
