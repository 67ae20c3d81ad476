"""Every parameter of a model by its canonical name: checkpoints, freezing, optimizers and the summary read it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_adamba.blueprint.resolve import mamba_inner_size
from megatron_adamba.config.model import ModelConfig

GROUPS = ("embedding", "head", "norm", "gain", "attention", "mlp", "mamba")
"""what `--train.freeze` and the summary group parameters by"""


@dataclass(frozen=True)
class ParamSpec:
    """One tensor: its canonical name, whole shape and what the rest of the project needs to know of it."""

    name: str
    shape: tuple[int, ...]
    group: str
    """one of GROUPS"""
    kind: str
    """matrix (a linear map: Muon may have it, weight decay applies) | table (embedding, head) | vector"""
    init: str
    """rule of `model/init.py`"""
    unit: str | None = None
    """what tensor parallelism deals out: kv_group, ffn_granule, vocab, mamba; None for tensors that stay whole"""
    unit_axis: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def manifest(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """All parameters of a resolved config, in the order in which the model holds them."""
    ends = (config.vocab_size, config.hidden_size)
    table = "tied_embedding" if config.tie_embeddings else "embedding"
    specs = [ParamSpec("embedding.weight", ends, "embedding", "table", table, "vocab", 0)]
    for index, letter in enumerate(config.block_pattern):
        prefix = f"blocks.{index}"
        if letter == "T":
            specs += _attention(config, prefix) + _mlp(config, prefix)
        else:
            specs += _static_norm(config, f"{prefix}.mixer_norm")
            specs += (_mamba2 if config.mamba_version == 2 else _mamba1)(config, f"{prefix}.mixer")
            if config.mamba_use_mlp:
                specs += _mlp(config, prefix)
    specs += _static_norm(config, "final_norm")
    if not config.tie_embeddings:
        specs.append(ParamSpec("head.weight", ends, "head", "table", "head", "vocab", 0))
    return tuple(specs)


def _static_norm(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    specs = []
    if config.norm_weight:
        specs.append(ParamSpec(f"{prefix}.weight", (config.hidden_size,), "norm", "vector", "ones"))
    specs.append(ParamSpec(f"{prefix}.gain", (1,), "gain", "vector", "ones"))
    return specs


def _nested_norm(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    specs = []
    if config.norm_weight:
        specs.append(ParamSpec(f"{prefix}.weight", (config.hidden_size,), "norm", "vector", "ones"))
    specs.append(ParamSpec(f"{prefix}.gain", (len(config.nest),), "gain", "vector", "ones"))
    return specs


def _attention(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    hidden, query, key = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_groups * config.head_dim
    specs = _nested_norm(config, f"{prefix}.attention_norm")
    rows = (("q", query), ("k", key), ("v", key))
    for name, size in rows:
        specs.append(
            ParamSpec(
                f"{prefix}.attention.qkv.{name}_weight", (size, hidden), "attention", "matrix", "linear", "kv_group", 0
            )
        )
    if config.linear_bias:
        for name, size in rows:
            specs.append(
                ParamSpec(f"{prefix}.attention.qkv.{name}_bias", (size,), "attention", "vector", "zeros", "kv_group", 0)
            )
    specs.append(
        ParamSpec(f"{prefix}.attention.out.o_weight", (hidden, query), "attention", "matrix", "output", "kv_group", 1)
    )
    if config.linear_bias:
        specs.append(ParamSpec(f"{prefix}.attention.out.o_bias", (hidden,), "attention", "vector", "zeros"))
    return specs


def _mlp(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    hidden, ffn = config.hidden_size, config.ffn_size
    specs = _nested_norm(config, f"{prefix}.mlp_norm")
    names = ("gate", "up") if config.activation == "swiglu" else ("up",)
    for name in names:
        specs.append(
            ParamSpec(f"{prefix}.mlp.up.{name}_weight", (ffn, hidden), "mlp", "matrix", "linear", "ffn_granule", 0)
        )
    if config.linear_bias:
        for name in names:
            specs.append(ParamSpec(f"{prefix}.mlp.up.{name}_bias", (ffn,), "mlp", "vector", "zeros", "ffn_granule", 0))
    specs.append(
        ParamSpec(f"{prefix}.mlp.down.down_weight", (hidden, ffn), "mlp", "matrix", "output", "ffn_granule", 1)
    )
    if config.linear_bias:
        specs.append(ParamSpec(f"{prefix}.mlp.down.down_bias", (hidden,), "mlp", "vector", "zeros"))
    return specs


def _mamba2(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    hidden, inner, heads = config.hidden_size, mamba_inner_size(config), config.mamba_num_heads
    channels = inner + 2 * config.mamba_num_groups * config.mamba_d_state
    rows = (
        ("dt_bias", (heads,), "vector", "dt_bias"),
        ("A_log", (heads,), "vector", "a_log_uniform"),
        ("D", (heads,), "vector", "ones"),
        ("in_proj.weight", (inner + channels + heads, hidden), "matrix", "linear"),
        ("conv1d.weight", (channels, config.mamba_d_conv), "vector", "conv"),
        ("conv1d.bias", (channels,), "vector", "zeros"),
        ("norm.weight", (inner,), "vector", "ones"),
        ("out_proj.weight", (hidden, inner), "matrix", "output"),
    )
    return [
        ParamSpec(f"{prefix}.{name}", shape, "mamba", kind, init, "mamba", 1 if name == "out_proj.weight" else 0)
        for name, shape, kind, init in rows
    ]


def mamba1_dt_rank(config: ModelConfig) -> int:
    """Rank of Mamba-1's dt projection: hidden_size / 16, rounded up."""
    return -(-config.hidden_size // 16)


def _mamba1(config: ModelConfig, prefix: str) -> list[ParamSpec]:
    hidden, inner, state, rank = (
        config.hidden_size,
        mamba_inner_size(config),
        config.mamba_d_state,
        mamba1_dt_rank(config),
    )
    rows = (
        ("A_log", (inner, state), "vector", "a_log_arange", 0),
        ("D", (inner,), "vector", "ones", 0),
        ("in_proj.weight", (2 * inner, hidden), "matrix", "linear", 0),
        ("conv1d.weight", (inner, config.mamba_d_conv), "vector", "conv", 0),
        ("conv1d.bias", (inner,), "vector", "zeros", 0),
        ("x_proj.weight", (rank + 2 * state, inner), "matrix", "linear", 1),
        ("dt_proj.weight", (inner, rank), "matrix", "linear", 0),
        ("dt_proj.bias", (inner,), "vector", "dt_bias", 0),
        ("out_proj.weight", (hidden, inner), "matrix", "output", 1),
    )
    return [
        ParamSpec(f"{prefix}.{name}", shape, "mamba", kind, init, "mamba", axis)
        for name, shape, kind, init, axis in rows
    ]
