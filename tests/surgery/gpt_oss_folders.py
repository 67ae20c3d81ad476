"""Tiny random GPT-OSS models of transformers, and folders that hold them in every layout and format.

Written from the public descriptions of the formats; nothing of `megatron_adamba.surgery` is used.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

SHAPES = {
    "grouped queries": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 4,
    },
    "square experts, one key head": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 7,
    },
    "every head its own keys": {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_local_experts": 7,
        "num_experts_per_tok": 1,
        "head_dim": 32,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "sliding_window": 1,
    },
}
VOCAB = 53
SQUARE = "square experts, one key head"
# a context so short that YaRN changes what a few tokens see
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
NIBBLES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def gpt_oss_config(shape: str, **changes) -> GptOssConfig:
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 128, "rope_parameters": dict(ROPE)}
    config = GptOssConfig(**{**settings, **ends, **SHAPES[shape], **changes})
    config._attn_implementation = "eager"
    return config


def random_gpt_oss(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> GptOssForCausalLM:
    """Every parameter random, norms, biases and sinks too; values are rounded to `dtype`, computation is in fp32."""
    model = GptOssForCausalLM(gpt_oss_config(shape, **changes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                value = 1 + 0.3 * noise
            elif parameter.dim() == 1 or name.endswith("_bias"):
                value = 0.7 * noise
            elif parameter.dim() == 3:
                # large enough for the clamp of gate and up to bite
                value = noise * (2.5 if "gate_up" in name else 0.3) * parameter.shape[1] ** -0.5
            else:
                value = noise * parameter.shape[1] ** -0.5
            parameter.copy_(value.to(dtype))
    return model.requires_grad_(False)


def packed_gpt_oss(shape: str, seed: int = 0) -> tuple[GptOssForCausalLM, dict[str, tuple[Tensor, Tensor]]]:
    """A bf16 model whose expert matrices are MXFP4 values, and these as (nibbles [experts, outputs, inputs], scales
    [experts, outputs, inputs / 32]) by parameter name."""
    model = random_gpt_oss(shape, torch.bfloat16, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    packed = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                experts, inputs, outputs = parameter.shape
                nibbles = torch.randint(0, 16, (experts, outputs, inputs), generator=generator)
                scales = torch.randint(121, 126, (experts, outputs, inputs // 32), generator=generator)
                packed[name] = (nibbles, scales)
                parameter.copy_(mxfp4_values(nibbles, scales).transpose(1, 2))
    return model, packed


def mxfp4_values(nibbles: Tensor, scales: Tensor) -> Tensor:
    """sign, magnitude and power of two, in double precision."""
    powers = torch.pow(2.0, scales.double() - 127).repeat_interleave(32, dim=-1)
    return torch.tensor(NIBBLES, dtype=torch.float64)[nibbles] * powers


def mxfp4_blocks(nibbles: Tensor) -> Tensor:
    """Two values a byte, the first of them in the low half; 16 bytes a block."""
    blocks = torch.zeros(*nibbles.shape[:-1], nibbles.shape[-1] // 32, 16, dtype=torch.uint8)
    flat = nibbles.reshape(*blocks.shape[:-1], 32)
    for place in range(16):
        blocks[..., place] = flat[..., 2 * place] + 16 * flat[..., 2 * place + 1]
    return blocks


def save_hugging_face(model: GptOssForCausalLM, folder: Path, dtype: torch.dtype, **options) -> Path:
    """By transformers itself. options: max_shard_size."""
    copy = GptOssForCausalLM(model.config).float()
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder, **options)
    return folder


def save_packed_hugging_face(model: GptOssForCausalLM, packed: dict, folder: Path) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in packed:
            nibbles, scales = packed[name]
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4_blocks(nibbles), scales.to(torch.uint8)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**model.config.to_dict(), "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


OPENAI_NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def openai_tensors(model: GptOssForCausalLM, dtype: torch.dtype, packed: dict | None = None) -> dict[str, Tensor]:
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    tensors = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.scale": state["model.norm.weight"],
        "unembedding.weight": state["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"block.{layer}."
        for name, place in OPENAI_NAMES.items():
            tensors[ours + place] = state[theirs + name]
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
        for name, place in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            full = f"{theirs}mlp.experts.{name}"
            if packed is None:
                tensors[f"{ours}mlp.{place}"] = state[full].transpose(1, 2).contiguous()
            else:
                nibbles, scales = packed[full]
                tensors[f"{ours}mlp.{place}.blocks"] = mxfp4_blocks(nibbles)
                tensors[f"{ours}mlp.{place}.scales"] = scales.to(torch.uint8)
    return tensors


def openai_config(model: GptOssForCausalLM) -> dict:
    config, rope = model.config, model.config.rope_parameters
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def save_openai(model: GptOssForCausalLM, folder: Path, dtype: torch.dtype, packed: dict | None = None) -> Path:
    """Two files without an index, as the 120b's `original` folder might be cut."""
    folder.mkdir(parents=True)
    tensors = openai_tensors(model, dtype, packed)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model--{number:05d}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(openai_config(model)))
    return folder


FORMATS = ("hf fp32", "hf bf16", "hf bf16 sharded", "hf mxfp4", "openai fp32", "openai bf16", "openai mxfp4")


def fits(shape: str, kind: str) -> bool:
    """MXFP4 needs whole blocks of 32 inputs."""
    return "mxfp4" not in kind or not (SHAPES[shape]["hidden_size"] % 32 or SHAPES[shape]["intermediate_size"] % 32)


def make_source(shape: str, kind: str, folder: Path) -> tuple[GptOssForCausalLM, Path]:
    """A model (fp32, with the values that were saved) and the folder that holds it."""
    if "mxfp4" in kind:
        model, packed = packed_gpt_oss(shape)
        if kind.startswith("hf"):
            return model, save_packed_hugging_face(model, packed, folder)
        return model, save_openai(model, folder, torch.bfloat16, packed)
    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    model = random_gpt_oss(shape, dtype)
    if kind.startswith("openai"):
        return model, save_openai(model, folder, dtype)
    options = {"max_shard_size": "20KB"} if "sharded" in kind else {}
    return model, save_hugging_face(model, folder, dtype, **options)


def expected_canonical(model: GptOssForCausalLM) -> dict[str, Tensor]:
    """Canonical tensors from transformers' own, without gains; an expert's rows are written out one by one."""
    state = model.state_dict()
    tensors = {"embedding.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        tensors["head.weight"] = state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        theirs = {k.split(".", 3)[3]: v for k, v in state.items() if k.startswith(f"model.layers.{layer}.")}
        ours = {
            "attention_norm.weight": theirs["input_layernorm.weight"],
            "moe_norm.weight": theirs["post_attention_layernorm.weight"],
            "attention.sinks": theirs["self_attn.sinks"],
            "moe.router.weight": theirs["mlp.router.weight"],
            "moe.router.bias": theirs["mlp.router.bias"],
            "moe.experts.down_bias": theirs["mlp.experts.down_proj_bias"],
        }
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in theirs:
                for part in "qkv":
                    ours[f"attention.qkv.{part}_{kind}"] = theirs[f"self_attn.{part}_proj.{kind}"]
                ours[f"attention.out.o_{kind}"] = theirs[f"self_attn.o_proj.{kind}"]
        gate_up, bias = theirs["mlp.experts.gate_up_proj"], theirs["mlp.experts.gate_up_proj_bias"]
        for first, name in enumerate(("gate", "up")):
            rows = range(first, gate_up.shape[2], 2)
            ours[f"moe.experts.{name}_weight"] = torch.stack([gate_up[:, :, row] for row in rows], dim=1)
            ours[f"moe.experts.{name}_bias"] = torch.stack([bias[:, row] for row in rows], dim=1)
        ours["moe.experts.down_weight"] = torch.einsum("eio->eoi", theirs["mlp.experts.down_proj"])
        tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in ours.items()}
    return tensors


def tokens_for(config, length: int = 41, batch: int = 2) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


def their_logits(model: GptOssForCausalLM, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits.float()


def write_tokenizer(path: Path, vocab_size: int = VOCAB) -> Path:
    """A tokenizer.json of `vocab_size` tokens."""
    from tokenizers import Tokenizer, models

    words = {f"w{index}": index for index in range(vocab_size - 1)} | {"<|endoftext|>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path
