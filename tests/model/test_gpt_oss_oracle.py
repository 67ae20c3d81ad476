"""GPT-OSS's architecture against `transformers`: logits, losses and gradients; every width against slices of itself."""

from __future__ import annotations

import pytest
import torch

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.rotary import Yarn

SHAPES = {
    "grouped queries": {"num_heads": 6, "num_kv_groups": 2, "num_experts": 5, "experts_per_token": 2},
    "one group": {"num_heads": 4, "num_kv_groups": 1, "num_experts": 3, "experts_per_token": 3},
    "top one": {"num_heads": 3, "num_kv_groups": 3, "num_experts": 7, "experts_per_token": 1, "sliding_window": 1},
    "plain rope": {"num_heads": 4, "num_kv_groups": 4, "num_experts": 4, "experts_per_token": 2, "rope_factor": 1.0},
}


def model_config(**changes) -> ModelConfig:
    shape = {
        "hidden_size": 48,
        "block_pattern": "EEE",
        "vocab_size": 61,
        "head_dim": 8,
        "linear_bias": True,
        "qk_norm": False,
        "attention_sinks": True,
        "sliding_window": 5,
        "window_pattern": "SL",
        "rope_theta": 150000.0,
        "rope_factor": 32.0,
        "rope_original_context": 16,
        "expert_ffn_size": 32,
        "ffn_granule": 16,
        "widths": [16, 48],
    }
    return resolve_model(ModelConfig(**{**shape, **changes}))


def peer_model(config: ModelConfig):
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor > 1:
        rope = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": config.rope_factor,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "original_max_position_embeddings": config.rope_original_context,
            "truncate": False,
        }
    settings = GptOssConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        intermediate_size=config.expert_ffn_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_groups,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attn_implementation="eager",
        tie_word_embeddings=False,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(settings).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.12 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return model


def places(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Our name -> (theirs, how theirs becomes ours)."""
    found = {
        "embedding.weight": ("model.embed_tokens.weight", "same"),
        "head.weight": ("lm_head.weight", "same"),
        "final_norm.weight": ("model.norm.weight", "same"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.weight"] = (f"{theirs}.input_layernorm.weight", "same")
        found[f"{ours}.moe_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight", "same")
        found[f"{ours}.attention.sinks"] = (f"{theirs}.self_attn.sinks", "same")
        for kind in ("weight", "bias"):
            for letter in "qkv":
                found[f"{ours}.attention.qkv.{letter}_{kind}"] = (f"{theirs}.self_attn.{letter}_proj.{kind}", "same")
            found[f"{ours}.attention.out.o_{kind}"] = (f"{theirs}.self_attn.o_proj.{kind}", "same")
            found[f"{ours}.moe.router.{kind}"] = (f"{theirs}.mlp.router.{kind}", "same")
        for name, how in (("gate", "even"), ("up", "odd")):
            found[f"{ours}.moe.experts.{name}_weight"] = (f"{theirs}.mlp.experts.gate_up_proj", how)
            found[f"{ours}.moe.experts.{name}_bias"] = (f"{theirs}.mlp.experts.gate_up_proj_bias", how)
        found[f"{ours}.moe.experts.down_weight"] = (f"{theirs}.mlp.experts.down_proj", "turned")
        found[f"{ours}.moe.experts.down_bias"] = (f"{theirs}.mlp.experts.down_proj_bias", "same")
    return found


def as_ours(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how in ("turned", "even", "odd") and tensor.dim() == 3:
        tensor = tensor.transpose(1, 2)
    if how in ("even", "odd"):
        return tensor[:, (how == "odd") :: 2]
    return tensor


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(name):
    config = model_config(**SHAPES[name])
    peer, model = peer_model(config), AdambaModel(config)
    held = dict(peer.named_parameters())
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            if ours.endswith("gain"):
                parameter.fill_(1)
            else:
                theirs, how = places(config)[ours]
                parameter.copy_(as_ours(held[theirs], how))
    tokens = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(2))
    logits = peer(tokens, use_cache=False).logits
    assert (model(tokens) - logits).abs().max() <= 1e-5
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    model(tokens, labels).backward()
    for ours, (theirs, how) in places(config).items():
        want = as_ours(held[theirs].grad, how)
        difference = (model.get_parameter(ours).grad - want).abs().max().item()
        assert difference <= 1e-5 * want.abs().max().item(), ours


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [8, 64])
def test_yarn_frequencies_are_those_of_transformers(head_dim):
    config = model_config(head_dim=head_dim, **SHAPES["grouped queries"])
    rotary = peer_model(config).model.rotary_emb
    yarn = Yarn(32.0, 16, 32.0, 1.0)
    plain = 150000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    assert torch.allclose(yarn.frequencies(plain, 150000.0), rotary.inv_freq, rtol=1e-6, atol=0)
    assert abs(yarn.concentration - rotary.attention_scaling) < 1e-9


def test_a_narrow_width_is_the_model_of_its_slices():
    """At width w every block is that of a model built with w channels, its heads and its rows."""
    config = model_config(**SHAPES["plain rope"], block_pattern="E", router_balance_weight=0.1)
    model = AdambaModel(config).initialize(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    row = config.nest[0]
    heads = row.kv_groups * config.num_heads // config.num_kv_groups
    small = model_config(
        **SHAPES["plain rope"] | {"num_heads": heads, "num_kv_groups": row.kv_groups},
        block_pattern="E", hidden_size=row.width, expert_ffn_size=row.expert_ffn, widths=[row.width],
    )  # fmt: skip
    block, dense = model.blocks[0], AdambaModel(small).blocks[0]
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            whole = block.get_parameter(name)
            parameter.copy_(whole[:1] if name.endswith("gain") else whole[tuple(slice(0, n) for n in parameter.shape)])
    x = torch.randn(2, 9, 48, generator=generator)
    context = model.training_context(torch.zeros(2, 9), None)
    out = block(x, row, context)
    assert torch.equal(out[..., row.width :], x[..., row.width :])
    want = dense(x[..., : row.width], small.nest[0], context)
    assert (out[..., : row.width] - want).abs().max() <= 1e-5
