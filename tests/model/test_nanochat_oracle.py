"""Configured like nanochat, the model is transformers' NanoChat."""

from __future__ import annotations

import pytest
import torch
from oracles.dense import near

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.model.adamba import AdambaModel

EPS = 1.1920929e-7
PLACES = {
    "attention.qkv.q_weight": "self_attn.q_proj",
    "attention.qkv.k_weight": "self_attn.k_proj",
    "attention.qkv.v_weight": "self_attn.v_proj",
    "attention.out.o_weight": "self_attn.o_proj",
    "mlp.up.up_weight": "mlp.fc1",
    "mlp.down.down_weight": "mlp.fc2",
}


def their_name(name: str) -> str | None:
    """Where nanochat keeps one of our parameters; None for gains, which it does not have."""
    if name.endswith("gain"):
        return None
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return f"model.layers.{index}.{PLACES[rest]}.weight"
    return {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[name]


def both_models(kv_heads: int):
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = resolve_model(
        ModelConfig(
            hidden_size=32,
            num_layers=3,
            vocab_size=61,
            num_heads=4,
            num_kv_groups=kv_heads,
            head_dim=8,
            ffn_size=96,
            ffn_granule=32,
            rope_sign=-1,
            embedding_norm=True,
            norm_weight=False,
            norm_eps=EPS,
            logit_softcap=15.0,
        )
    )
    ours = AdambaModel(config).initialize(0)
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            rms_norm_eps=EPS,
            final_logit_softcapping=15.0,
            # as a padding index it would take the gradient of one row of the embedding away
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).float()
    generator = torch.Generator().manual_seed(5)
    copied = set()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            place = their_name(name)
            if place is None:
                continue
            # the head large enough for the softcap to bend the logits
            scale = 3.0 if name == "head.weight" else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            theirs.get_parameter(place).copy_(parameter)
            copied.add(place)
    assert copied == {name for name, _ in theirs.named_parameters()}
    return ours, theirs


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_and_gradients_are_nanochats(kv_heads):
    ours, theirs = both_models(kv_heads)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (2, 23), generator=generator)
    labels = torch.randint(0, 61, (2, 23), generator=generator)
    got, want = ours(tokens), theirs(tokens, use_cache=False).logits
    assert want.abs().max() > 6, "the softcap must bend something"
    assert (got - want).abs().max() <= 1e-5

    loss = ours(tokens, labels)
    expected = torch.nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten())
    assert abs(loss.item() - expected.item()) <= 1e-5
    torch.autograd.backward([loss, expected])
    for name, parameter in ours.named_parameters():
        place = their_name(name)
        if place is not None:
            near(parameter.grad, theirs.get_parameter(place).grad, what=name)
