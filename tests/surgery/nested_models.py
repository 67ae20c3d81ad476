"""Small elastic models of every kind, with nothing at its neutral value, as canonical checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from oracles.dense import randomize
from torch import Tensor

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import load_into, write_canonical
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.root import AdambaConfig, read_model_config
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.errors import AdambaError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.writing import write_job

SHAPE = {"hidden_size": 32, "vocab_size": 257, "head_dim": 8, "ffn_granule": 16, "widths": [8, 16, 32]}
EXPERTS = {"num_experts": 3, "experts_per_token": 2, "expert_ffn_size": 48}
MAMBA = {"mamba_head_dim": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
KINDS = {
    "T": {"block_pattern": "TTT", "sliding_window": 3, "window_pattern": "SL"},
    "T, grouped, biases, sinks, tied": {
        "block_pattern": "TTT",
        "num_heads": 12,
        "num_kv_groups": 4,
        "linear_bias": True,
        "attention_sinks": True,
        "qk_norm": False,
        "activation": "swiglu",
        "tie_embeddings": True,
        "logit_softcap": 15.0,
    },
    "T, another norm size, uneven rows": {
        "block_pattern": "TTT",
        "num_kv_groups": 4,
        "ffn_size": 128,
        "static_norm_size": 20,
        "widths": None,
        "nest": [NestRow(8, 6, 1, 16), NestRow(16, 24, 3, 64), NestRow(32, 20, 4, 112)],
    },
    "T, without norm weights": {"block_pattern": "TTT", "norm_weight": False, "rope_sign": -1, "embedding_norm": True},
    "E": {"block_pattern": "EEE", **EXPERTS, "linear_bias": True, "attention_sinks": True, "num_kv_groups": 2},
    "mixed": {"block_pattern": "TMEME", **EXPERTS, **MAMBA, "mamba_use_mlp": True, "linear_bias": True},
    "M with an MLP": {"block_pattern": "MMM", **MAMBA, "mamba_use_mlp": True},
    "Mamba-1": {"block_pattern": "TMT", "mamba_version": 1, "mamba_d_state": 4},
}


def source_model(kind: str = "T", seed: int = 6, **changes) -> AdambaModel:
    model = AdambaModel(resolve_model(ModelConfig(**{**SHAPE, **KINDS[kind], **changes})))
    randomize(model, seed)
    return model.requires_grad_(False).eval()


def saved(model: AdambaModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As a run leaves it, with all its settings, in several files."""
    config = AdambaConfig(model=model.config).to_dict()
    config["data"]["tokenizer"], config["tokenizer_hash"] = "bytes", ByteTokenizer().hash
    tensors = ((name, tensor.to(dtype)) for name, tensor in model.named_parameters())
    write_canonical(folder, config, tensors, max_shard_bytes=30_000)
    return folder


def made(job, folder: Path) -> Path:
    write_job(job, folder, 20_000, lambda *_: None)
    return folder


def load(folder: Path) -> AdambaModel:
    """From the files alone."""
    model = AdambaModel(read_model_config(folder))
    load_into(model, folder)
    return model.requires_grad_(False).eval()


def some_tokens(seed: int = 1, length: int = 23) -> Tensor:
    return torch.randint(0, 257, (2, length), generator=torch.Generator().manual_seed(seed))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def lose_a_shard(folder: Path) -> Path:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return shard


def refused(job, *fragments: str, kind: type[AdambaError] = AdambaError) -> None:
    """job() fails with one line that says all of this."""
    try:
        job()
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(fragment in text for fragment in fragments), text
        return
    raise AssertionError("was not refused")


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))
