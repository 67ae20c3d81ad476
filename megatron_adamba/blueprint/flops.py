"""Floating-point operations that a token really costs: those of the slices that run, at each width."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adamba.blueprint.manifest import mamba1_dt_rank
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows, mamba_inner_size
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel


@dataclass(frozen=True)
class Work:
    """What a block computes with one part of its parameters, or without any."""

    part: str | None
    """the module, by its name within the block; None where two activations are multiplied"""
    flops: int
    """forward, per token; a multiply-add counts two, and norms count nothing"""


def block_work(
    config: ResolvedModel, letter: str, row: NestRow, window: int | None, seq_len: int
) -> list[tuple[Work, ...]]:
    """One block at one nest row, step by step: what stands in one tuple reads the same input.

    Attention over a causal context counts its mean number of keys, (seq_len + 1) / 2 without a window.
    """
    if letter == "M":
        steps = [(Work("mixer_norm", 0),), *_mamba_work(config)]
        return steps + (_mlp_work(config, row) if config.mamba_use_mlp else [])
    heads = row.kv_groups * (config.num_heads // config.num_kv_groups)
    query, key = heads * config.head_dim, row.kv_groups * config.head_dim
    steps = [
        (Work("attention_norm", 0),),
        (Work("attention", 2 * row.width * (query + 2 * key)),),
        (Work(None, int(2 * 2 * query * mean_keys(seq_len, window))),),
        (Work("attention", 2 * row.width * query),),
    ]
    return steps + (_expert_work(config, row) if letter == "E" else _mlp_work(config, row))


def _mlp_work(config: ResolvedModel, row: NestRow) -> list[tuple[Work, ...]]:
    matrix = 2 * row.width * row.ffn
    up = 2 * matrix if config.activation == "swiglu" else matrix
    return [(Work("mlp_norm", 0),), (Work("mlp", up),), (Work("mlp", matrix),)]


def _expert_work(config: ResolvedModel, row: NestRow) -> list[tuple[Work, ...]]:
    matrix = 2 * row.width * row.expert_ffn * config.experts_per_token
    # the gradient of what the router chose needs the one that goes into the experts' last matrix
    first = (Work("moe.router", 2 * row.width * config.num_experts), Work("moe.experts", 2 * matrix))
    return [(Work("moe_norm", 0),), first, (Work("moe.experts", matrix),)]


def block_flops(config: ResolvedModel, letter: str, row: NestRow, window: int | None, seq_len: int) -> int:
    """Forward FLOPs per token of one block at one nest row."""
    steps = block_work(config, letter, row, window, seq_len)
    return sum(work.flops for step in steps for work in step)


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query of a causal sequence sees on average."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def _mamba_work(config: ResolvedModel) -> list[tuple[Work, ...]]:
    hidden, inner, state = config.hidden_size, mamba_inner_size(config), config.mamba_d_state
    convolution, scan = 2 * config.mamba_d_conv, Work(None, _scan_flops(config))
    output = Work("mixer", 2 * inner * hidden)
    if config.mamba_version == 1:
        rank = mamba1_dt_rank(config)
        steps = [2 * hidden * 2 * inner, inner * convolution, 2 * inner * (rank + 2 * state), 2 * rank * inner]
    else:
        channels = inner + 2 * config.mamba_num_groups * state
        steps = [2 * hidden * (inner + channels + config.mamba_num_heads), channels * convolution]
    return [*((Work("mixer", flops),) for flops in steps), (scan,), (output,)]


def _scan_flops(config: ResolvedModel) -> int:
    inner, state, groups = mamba_inner_size(config), config.mamba_d_state, config.mamba_num_groups
    if config.mamba_version == 1:
        # per channel and state: decay product, input product, their sum, and the output's multiply-add
        return 7 * inner * state
    # Inside a chunk: scores C B^T per group and their product with x, half of each; between chunks: states in and
    # out. At the config's chunk, so that a model's figures are the same everywhere; PyTorch's scan on a CPU may take a
    # shorter one.
    return (groups * state + inner) * config.mamba_chunk_size + 4 * inner * state


def forward_flops(config: ResolvedModel, widths: tuple[int, ...], seq_len: int, exit_layer: int | None = None) -> int:
    """Forward FLOPs per token of the whole model.

    widths: one of the nest's widths per block; exit_layer: blocks that run (None: all of them). The head is counted,
    the embedding's look-up is free.
    """
    rows = block_rows(config)
    windows = attention_windows(config)
    depth = config.num_layers if exit_layer is None else exit_layer
    total = 2 * config.hidden_size * config.vocab_size
    for index in range(depth):
        total += block_flops(config, config.block_pattern[index], rows[index][widths[index]], windows[index], seq_len)
    return total
