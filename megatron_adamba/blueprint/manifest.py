"""Every parameter of a model by its canonical name: checkpoints, freezing, optimizers and the summary read it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_adamba.blueprint.nest import block_config
from megatron_adamba.blueprint.resolve import mamba_inner_size
from megatron_adamba.config.resolved import ResolvedModel

GROUPS = ("embedding", "head", "norm", "gain", "attention", "mlp", "router", "expert", "mamba")
"""what `--train.freeze` and the summary group parameters by"""


@dataclass(frozen=True)
class ParamSpec:
    """One tensor: its canonical name, whole shape and what the rest of the project needs to know of it."""

    name: str
    shape: tuple[int, ...]
    group: str
    """one of GROUPS"""
    kind: str
    """matrix (a linear map: Muon may have it, weight decay applies) | matrices (one an expert) | table (embedding,
    head) | vector"""
    init: str
    """rule of `model/init.py`"""
    unit: str | None = None
    """what tensor parallelism deals out: kv_group, ffn_granule, vocab, mamba; None for tensors that stay whole. Of
    `expert` it is expert parallelism"""
    unit_axis: int | None = None
    parts: tuple[tuple[int, int], ...] = ()
    """(length, unit length) of each part of that axis, in order; every part is dealt out by itself. A last unit may be
    shorter"""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def manifest(config: ResolvedModel) -> tuple[ParamSpec, ...]:
    """All parameters of a resolved config, in the order in which the model holds them."""
    ends = (config.vocab_size, config.hidden_size)
    table = "tied_embedding" if config.tie_embeddings else "embedding"
    vocab = ((config.vocab_size, vocab_unit(config.vocab_size)),)
    specs = [ParamSpec("embedding.weight", ends, "embedding", "table", table, "vocab", 0, vocab)]
    for index, letter in enumerate(config.block_pattern):
        prefix, own = f"blocks.{index}", block_config(config, index)
        if letter in "TE":
            specs += _attention(own, prefix)
            specs += _mlp(own, prefix) if letter == "T" else _experts(own, prefix)
        else:
            specs += _static_norm(config, f"{prefix}.mixer_norm")
            specs += (_mamba2 if config.mamba_version == 2 else _mamba1)(config, f"{prefix}.mixer")
            if config.mamba_use_mlp:
                specs += _mlp(own, prefix)
    specs += _static_norm(config, "final_norm")
    if not config.tie_embeddings:
        specs.append(ParamSpec("head.weight", ends, "head", "table", "head", "vocab", 0, vocab))
    return tuple(specs)


def vocab_unit(vocab_size: int) -> int:
    """Rows of the vocabulary that stay together: 64, which keeps shards at sizes that matmul kernels like, 1 in small
    vocabularies."""
    return 64 if vocab_size >= 4096 else 1


def _static_norm(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    specs = []
    if config.norm_weight:
        specs.append(ParamSpec(f"{prefix}.weight", (config.hidden_size,), "norm", "vector", "ones"))
    specs.append(ParamSpec(f"{prefix}.gain", (1,), "gain", "vector", "ones"))
    return specs


def _nested_norm(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    specs = []
    if config.norm_weight:
        specs.append(ParamSpec(f"{prefix}.weight", (config.widths[-1],), "norm", "vector", "ones"))
    specs.append(ParamSpec(f"{prefix}.gain", (len(config.nest),), "gain", "vector", "ones"))
    return specs


def _attention(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    width, query, key = config.widths[-1], config.num_heads * config.head_dim, config.num_kv_groups * config.head_dim
    specs = _nested_norm(config, f"{prefix}.attention_norm")
    rows = (("q", query), ("k", key), ("v", key))

    def add(name: str, shape: tuple[int, ...], kind: str, init: str, axis: int) -> None:
        parts = ((shape[axis], shape[axis] // config.num_kv_groups),)
        specs.append(ParamSpec(f"{prefix}.attention.{name}", shape, "attention", kind, init, "kv_group", axis, parts))

    for name, size in rows:
        add(f"qkv.{name}_weight", (size, width), "matrix", "linear", 0)
    if config.linear_bias:
        for name, size in rows:
            add(f"qkv.{name}_bias", (size,), "vector", "zeros", 0)
    if config.attention_sinks:
        add("sinks", (config.num_heads,), "vector", "zeros", 0)
    add("out.o_weight", (width, query), "matrix", "output", 1)
    if config.linear_bias:
        specs.append(ParamSpec(f"{prefix}.attention.out.o_bias", (width,), "attention", "vector", "zeros"))
    return specs


def _mlp(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    width, ffn = config.widths[-1], config.ffn_size
    specs = _nested_norm(config, f"{prefix}.mlp_norm")
    names = ("gate", "up") if config.activation == "swiglu" else ("up",)
    parts = ((ffn, config.ffn_granule),)

    def add(name: str, shape: tuple[int, ...], kind: str, init: str, axis: int) -> None:
        specs.append(ParamSpec(f"{prefix}.mlp.{name}", shape, "mlp", kind, init, "ffn_granule", axis, parts))

    for name in names:
        add(f"up.{name}_weight", (ffn, width), "matrix", "linear", 0)
    if config.linear_bias:
        for name in names:
            add(f"up.{name}_bias", (ffn,), "vector", "zeros", 0)
    add("down.down_weight", (width, ffn), "matrix", "output", 1)
    if config.linear_bias:
        specs.append(ParamSpec(f"{prefix}.mlp.down.down_bias", (width,), "mlp", "vector", "zeros"))
    return specs


def _experts(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    width, rows, count = config.widths[-1], config.expert_ffn_size, config.num_experts
    specs = _nested_norm(config, f"{prefix}.moe_norm")
    specs.append(ParamSpec(f"{prefix}.moe.router.weight", (count, width), "router", "matrix", "linear"))
    specs.append(ParamSpec(f"{prefix}.moe.router.bias", (count,), "router", "vector", "zeros"))
    parts = ((count, 1),)

    def add(name: str, shape: tuple[int, ...], kind: str, init: str) -> None:
        specs.append(ParamSpec(f"{prefix}.moe.experts.{name}", shape, "expert", kind, init, "expert", 0, parts))

    for name in ("gate", "up"):
        add(f"{name}_weight", (count, rows, width), "matrices", "linear")
    for name in ("gate", "up"):
        add(f"{name}_bias", (count, rows), "vector", "zeros")
    add("down_weight", (count, width, rows), "matrices", "output")
    add("down_bias", (count, width), "vector", "zeros")
    return specs


def _mamba2(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    hidden, inner, heads = config.hidden_size, mamba_inner_size(config), config.mamba_num_heads
    groups, state = config.mamba_num_groups, config.mamba_num_groups * config.mamba_d_state
    channels = inner + 2 * state
    # a unit is a group: its heads, their channels, and its B and C
    part = lambda *lengths: tuple((length, length // groups) for length in lengths)
    by_head, by_channel, convolved = part(heads), part(inner), part(inner, state, state)
    rows = (
        ("dt_bias", (heads,), "vector", "dt_bias", 0, by_head),
        ("A_log", (heads,), "vector", "a_log_uniform", 0, by_head),
        ("D", (heads,), "vector", "ones", 0, by_head),
        ("in_proj.weight", (inner + channels + heads, hidden), "matrix", "linear", 0, by_channel + convolved + by_head),
        ("conv1d.weight", (channels, config.mamba_d_conv), "vector", "conv", 0, convolved),
        ("conv1d.bias", (channels,), "vector", "zeros", 0, convolved),
        ("norm.weight", (inner,), "vector", "ones", 0, by_channel),
        ("out_proj.weight", (hidden, inner), "matrix", "output", 1, by_channel),
    )
    return _mamba_specs(prefix, rows)


def _mamba_specs(prefix: str, rows) -> list[ParamSpec]:
    return [
        ParamSpec(f"{prefix}.{name}", shape, "mamba", kind, init, "mamba", axis, parts)
        for name, shape, kind, init, axis, parts in rows
    ]


def mamba1_dt_rank(config: ResolvedModel) -> int:
    """Rank of Mamba-1's dt projection: hidden_size / 16, rounded up."""
    return -(-config.hidden_size // 16)


def _mamba1(config: ResolvedModel, prefix: str) -> list[ParamSpec]:
    hidden, inner, state, rank = (
        config.hidden_size,
        mamba_inner_size(config),
        config.mamba_d_state,
        mamba1_dt_rank(config),
    )
    channels = ((inner, 1),)
    rows = (
        ("A_log", (inner, state), "vector", "a_log_arange", 0, channels),
        ("D", (inner,), "vector", "ones", 0, channels),
        ("in_proj.weight", (2 * inner, hidden), "matrix", "linear", 0, channels * 2),
        ("conv1d.weight", (inner, config.mamba_d_conv), "vector", "conv", 0, channels),
        ("conv1d.bias", (inner,), "vector", "zeros", 0, channels),
        ("x_proj.weight", (rank + 2 * state, inner), "matrix", "linear", 1, channels),
        ("dt_proj.weight", (inner, rank), "matrix", "linear", 0, channels),
        ("dt_proj.bias", (inner,), "vector", "dt_bias", 0, channels),
        ("out_proj.weight", (hidden, inner), "matrix", "output", 1, channels),
    )
    return _mamba_specs(prefix, rows)
