"""Tiny random nanochat models of transformers, and folders that hold them as nanochat and transformers write them.

Written from the public descriptions of the formats; nothing of `megatron_adamba.surgery` is used.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import NanoChatConfig, NanoChatForCausalLM

EPS = 1.1920929e-7
VOCAB = 61
NAMES = {
    "self_attn.q_proj": ("attn.c_q", "attention.qkv.q_weight"),
    "self_attn.k_proj": ("attn.c_k", "attention.qkv.k_weight"),
    "self_attn.v_proj": ("attn.c_v", "attention.qkv.v_weight"),
    "self_attn.o_proj": ("attn.c_proj", "attention.out.o_weight"),
    "mlp.fc1": ("mlp.c_fc", "mlp.up.up_weight"),
    "mlp.fc2": ("mlp.c_proj", "mlp.down.down_weight"),
}
"""transformers' name in a layer -> nanochat's and the canonical one"""


def random_nanochat(kv_heads: int = 2, seed: int = 0, **changes) -> NanoChatForCausalLM:
    """Every parameter random, the head large enough for the softcap to bend the logits."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": EPS,
        "final_logit_softcapping": 15.0,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = NanoChatConfig(**{**settings, **changes})
    config._attn_implementation = "eager"
    model = NanoChatForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 2.0 if name == "lm_head.weight" else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


def renamed(state: dict[str, Tensor], form: int) -> dict[str, Tensor]:
    """Tensors of transformers under nanochat's names (form 0) or ours (form 1)."""
    ends = {
        "model.embed_tokens.weight": ("transformer.wte.weight", "embedding.weight"),
        "lm_head.weight": ("lm_head.weight", "head.weight"),
    }
    tensors = {}
    for name, tensor in state.items():
        if name in ends:
            tensors[ends[name][form]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        places = NAMES[rest.removesuffix(".weight")]
        place = f"transformer.h.{layer}.{places[0]}.weight" if form == 0 else f"blocks.{layer}.{places[1]}"
        tensors[place] = tensor
    return tensors


def own_tensors(model: NanoChatForCausalLM) -> dict[str, Tensor]:
    """As nanochat keeps them: the embedding in bf16, all else in fp32. The model's embedding is rounded to that."""
    embedding = model.model.embed_tokens.weight
    embedding.copy_(embedding.bfloat16())
    tensors = {name: tensor.clone() for name, tensor in renamed(model.state_dict(), 0).items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].bfloat16()
    return tensors


def own_metadata(model: NanoChatForCausalLM, step: int = 650, **changes) -> dict:
    """changes: of model_config; None takes a key out."""
    config = model.config
    values = {
        "sequence_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
        **changes,
    }
    values = {key: value for key, value in values.items() if value is not None}
    return {"step": step, "val_bpb": 0.7, "model_config": values, "user_config": {"run": "dummy", "depth": 32}}


def save_own(folder: Path, tensors: dict, metadata: dict, step: int = 650, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(metadata, indent=2))
    return folder


def save_random(folder: Path, kv_heads: int = 2, prefix: str = "", **changes) -> tuple[NanoChatForCausalLM, Path]:
    """A model and the folder that holds it as nanochat would."""
    model = random_nanochat(kv_heads, **changes)
    tensors = own_tensors(model)
    return model, save_own(folder, tensors, own_metadata(model), prefix=prefix)


def tokens_of(model: NanoChatForCausalLM, length: int = 37) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (2, length), generator=generator)


def their_logits(model: NanoChatForCausalLM) -> Tensor:
    return model(tokens_of(model), use_cache=False).logits


def with_windows(model: NanoChatForCausalLM, lefts: list[int | None]) -> NanoChatForCausalLM:
    """Each layer sees as many keys before a token's own as `lefts` says, None being all: transformers' NanoChat has no
    windows, but it does what its layers' masks say."""
    for layer, left in zip(model.model.layers, lefts, strict=True):

        def masked(_, args, kwargs, left=left):
            length = args[0].shape[1]
            back = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            seen = (back >= 0) & (back <= (length if left is None else left))
            mask = torch.zeros(1, 1, length, length).masked_fill(~seen, float("-inf"))
            return args, {**kwargs, "attention_mask": mask}

        layer.register_forward_pre_hook(masked, with_kwargs=True)
    return model
