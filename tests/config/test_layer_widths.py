"""`layer_widths`: blocks whose elastic weights end at widths of their own."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from megatron_adamba.blueprint.degrees import divided_sizes, legal_tp_degrees, obstacle, shared_units
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import block_config
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.summary import summarize
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import model_config_from_dict
from megatron_adamba.elastic.plan import full_plan, uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.parallel.layout import cut, join, local_shape
from megatron_adamba.parallel.tensor import TensorParallel

SHAPE = {
    "hidden_size": 64,
    "block_pattern": "TMET",
    "vocab_size": 50,
    "head_dim": 8,
    "num_kv_groups": 4,
    "ffn_granule": 16,
    "ffn_size": 256,
    "widths": [8, 16, 32],
    "layer_widths": [32, 16, 32, 16],
    "num_experts": 3,
    "experts_per_token": 2,
    "mamba_head_dim": 8,
    "mamba_num_groups": 4,
    "mamba_use_mlp": True,
    "linear_bias": True,
    "attention_sinks": True,
}


def shaped(**changes) -> ModelConfig:
    return resolve_model(ModelConfig(**{**SHAPE, **changes}))


def test_the_manifest_is_the_models():
    config = shaped()
    model = AdambaModel(config, device="meta")
    assert {spec.name: spec.shape for spec in manifest(config)} == {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters()
    }
    assert resolve_model(config) == config
    assert model_config_from_dict(asdict(config), "config.json") == config


def test_a_block_sees_its_own_sizes():
    """8 heads in 4 groups and 256 rows at width 64; the hidden size and Mamba are everybody's."""
    config = shaped()
    sizes = [
        (own.widths[-1], own.num_heads, own.num_kv_groups, own.ffn_size, own.hidden_size, own.mamba_num_heads)
        for own in (block_config(config, index) for index in range(4))
    ]
    assert sizes == [(32, 4, 2, 128, 64, 16), (16, 2, 1, 64, 64, 16), (32, 4, 2, 128, 64, 16), (16, 2, 1, 64, 64, 16)]
    plain = shaped(widths=[8, 64], layer_widths=None)
    assert block_config(plain, 2) is plain


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_those_of_the_layers(tp):
    """A width of its own is a number of units of its own; shards are joined to what they were cut from."""
    config = shaped(layer_widths=[32, 64, 64, 32], widths=[8, 32, 64], num_kv_groups=8, num_heads=8, ffn_size=512)
    generator = torch.Generator().manual_seed(0)
    models = [AdambaModel(config, device="meta", tp=TensorParallel(tp, rank)) for rank in range(tp)]
    held = [dict(model.named_parameters()) for model in models]
    for spec in manifest(config):
        if spec.unit == "expert":
            continue
        whole = torch.rand(spec.shape, generator=generator)
        parts = [cut(spec, whole, tp, rank) for rank in range(tp)]
        assert torch.equal(join(spec, parts), whole)
        for rank, part in enumerate(parts):
            assert part.shape == held[rank][spec.name].shape == local_shape(spec, tp, rank), spec.name


def test_tensor_parallel_degrees_are_those_of_every_block():
    config = shaped(layer_widths=[32, 32, 32, 32])
    assert divided_sizes(config)["--model.num_kv_groups"] == 2 and legal_tp_degrees(config) == [1, 2]
    assert shared_units(config)["--model.ffn_granule"] == 128 // 16
    config = shaped()
    assert legal_tp_degrees(config) == [1] and "does not divide --model.num_kv_groups (1)" in obstacle(config, 2)
    # a narrow MLP alone can be in the way
    config = shaped(block_pattern="MM", layer_widths=[32, 8], ffn_size=128, num_experts=0)
    assert legal_tp_degrees(config) == [1] and "leaves ranks without a unit of --model.ffn_granule" in obstacle(
        config, 2
    )


def test_the_summary_counts_what_is_there():
    config = shaped()
    summary = summarize(config, 100)
    held = sum(tensor.numel() for tensor in AdambaModel(config, device="meta").parameters())
    assert summary["total"] == held
    assert [row["width"] for row in summary["widths"]] == [8, 16, 32]
    assert summary["widths"][-1]["share_of_full"] == 1
    flops = [row["forward_flops"] for row in summary["widths"]]
    assert flops == sorted(set(flops))


def test_plans_and_gradients():
    """All of every block trains under the largest plan, whichever way it is asked for."""
    config = shaped()
    assert full_plan(config).widths == (32, 16, 32, 16)
    model = AdambaModel(config).initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(2))
    gradients = []
    for plan in (full_plan(config), uniform_plan(config, 32), None):
        model.zero_grad()
        model(tokens, tokens, plan=plan).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any() and all(torch.equal(other[name], gradient) for other in gradients[1:]), name
        if name.endswith("o_weight"):
            assert gradient.any(0).all() and gradient.any(1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_widths": [32, 16]}, "lists 2 widths for 4 blocks; try [32, 32, 32, 32]"),
        ({"layer_widths": [32, 16, 32, 24]}, "24 is not in the nest [8, 16, 32]; try 16"),
        ({"layer_widths": [16] * 4}, "the nest [8, 16, 32] must end at the largest of them, 16"),
        ({"layer_widths": None}, "--model.widths [8, 16, 32]: the last width must be the hidden size"),
    ],
    ids=str,
)
def test_widths_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError) as raised:
        shaped(**changes)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_nest_wider_than_the_model():
    nest = asdict(shaped(layer_widths=None, widths=[8, 64]))
    nest["nest"][-1]["width"] = 128
    nest |= {"widths": None, "layer_widths": [128] * 4}
    with pytest.raises(ConfigError, match=r"within the hidden size 64; try --model.widths \[8\]"):
        resolve_model(model_config_from_dict(nest, "config.json"))
