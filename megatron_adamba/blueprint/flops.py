"""Floating-point operations that a token really costs: those of the slices that run, at each width."""

from __future__ import annotations

from megatron_adamba.blueprint.manifest import mamba1_dt_rank
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows, mamba_inner_size
from megatron_adamba.config.model import ModelConfig, NestRow


def block_flops(config: ModelConfig, letter: str, row: NestRow, window: int | None, seq_len: int) -> int:
    """Forward FLOPs per token of one block at one nest row; a multiply-add counts two.

    Attention over a causal context counts its mean number of keys, (seq_len + 1) / 2 without a window.
    """
    mlp_matrices = 3 if config.activation == "swiglu" else 2
    mlp = 2 * mlp_matrices * row.width * row.ffn
    if letter == "M":
        return _mamba_flops(config) + (mlp if config.mamba_use_mlp else 0)
    heads = row.kv_groups * (config.num_heads // config.num_kv_groups)
    query, key = heads * config.head_dim, row.kv_groups * config.head_dim
    projections = 2 * row.width * (2 * query + 2 * key)
    keys = mean_keys(seq_len, window)
    if letter == "E":
        mlp = 2 * row.width * (config.num_experts + config.experts_per_token * 3 * row.expert_ffn)
    return projections + int(2 * 2 * query * keys) + mlp


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query of a causal sequence sees on average."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def _mamba_flops(config: ModelConfig) -> int:
    hidden, inner, state = config.hidden_size, mamba_inner_size(config), config.mamba_d_state
    if config.mamba_version == 1:
        rank = mamba1_dt_rank(config)
        matrices = 2 * hidden * 2 * inner + 2 * inner * (rank + 2 * state) + 2 * rank * inner + 2 * inner * hidden
        # per channel and state: decay product, input product, their sum, and the output's multiply-add
        return matrices + 2 * inner * config.mamba_d_conv + 7 * inner * state
    groups, heads, chunk = config.mamba_num_groups, config.mamba_num_heads, config.mamba_chunk_size
    channels = inner + 2 * groups * state
    matrices = 2 * hidden * (inner + channels + heads) + 2 * inner * hidden
    # Inside a chunk: scores C B^T per group and their product with x; between chunks: states in and out. At the
    # config's chunk, so that a model's figures are the same everywhere; PyTorch's scan on a CPU may take a shorter one.
    scan = 2 * groups * state * chunk / 2 + 2 * inner * chunk / 2 + 4 * inner * state
    return int(matrices + 2 * channels * config.mamba_d_conv + scan)


def forward_flops(config: ModelConfig, widths: tuple[int, ...], seq_len: int, exit_layer: int | None = None) -> int:
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


def training_flops(config: ModelConfig, widths: tuple[int, ...], seq_len: int, exit_layer: int | None = None) -> int:
    """Forward + backward FLOPs per token: backward is twice the forward; recomputation is not counted."""
    return 3 * forward_flops(config, widths, seq_len, exit_layer)
