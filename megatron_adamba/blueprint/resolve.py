"""Fill in every size that a model config leaves out, and check that the sizes fit each other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from megatron_adamba.blueprint.nest import check_nest, copy_rows, default_nest, round_up
from megatron_adamba.blueprint.pattern import parse_pattern
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import ConfigError


def resolve_model(config: ModelConfig, vocab_size: int | None = None) -> ResolvedModel:
    """The same model with nothing left to derive; what layers, manifest and checkpoints read.

    vocab_size: the tokenizer's, which must fit into `config.vocab_size` where both are given: published models have
    rows that no token uses.
    Idempotent. Raises ConfigError.
    """
    if vocab_size is not None and config.vocab_size is not None and config.vocab_size < vocab_size:
        raise ConfigError(
            f"--model.vocab_size {config.vocab_size}: the tokenizer has {vocab_size} tokens; leave the flag out"
        )
    letters = parse_pattern(config.block_pattern, config.num_layers)
    config = replace(
        config,
        block_pattern="".join(letters),
        num_layers=len(letters),
        vocab_size=config.vocab_size or vocab_size,
        modes=dict(config.modes),
        static_norm_size=config.static_norm_size or config.hidden_size,
        layer_widths=None if config.layer_widths is None else list(config.layer_widths),
    )
    config = _resolve_attention(config)
    config = _resolve_ffn(config)
    config = _resolve_experts(config, letters)
    config = _resolve_mamba(config, letters)
    widths = list(config.widths) if config.widths is not None else None
    if config.nest is not None:
        nest = copy_rows(config.nest)
        listed = [row.width for row in nest]
        if widths is not None and widths != listed:
            raise ConfigError(f"--model.widths {widths}: the nest table has {listed}; give one of the two")
        resolved = ResolvedModel(**{**vars(config), "widths": listed, "nest": nest})
    else:
        widths = widths or [config.hidden_size]
        _check_widths(widths, config.hidden_size)
        resolved = ResolvedModel(**{**vars(config), "widths": widths})
        resolved.nest = default_nest(resolved)
    check_nest(resolved)
    return resolved


def _check_widths(widths: list[int], hidden: int) -> None:
    for width in widths:
        if not 1 <= width <= hidden:
            raise ConfigError(f"--model.widths: {width} does not fit a hidden size of {hidden}; try {hidden // 2 or 1}")


def _resolve_attention(config: ModelConfig) -> ModelConfig:
    if config.head_dim % 2:
        raise ConfigError(f"--model.head_dim {config.head_dim}: RoPE needs an even number; try {config.head_dim + 1}")
    steps = config.head_dim_steps
    even = steps is None or (steps and steps[0] > 0 and not any(n % 2 for n in steps))
    if not even or (steps is not None and (steps != sorted(set(steps)) or steps[-1] != config.head_dim)):
        raise ConfigError(
            f"--model.head_dim_steps {steps}: must be even numbers that ascend to head_dim; try [{config.head_dim}]"
        )
    heads = config.num_heads or config.hidden_size // config.head_dim
    if heads < 1:
        raise ConfigError(
            f"--model.head_dim {config.head_dim}: larger than hidden_size {config.hidden_size}; "
            f"try --model.head_dim {max(config.hidden_size // 2, 2)} or give --model.num_heads"
        )
    groups = config.num_kv_groups or heads
    if heads % groups:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(f"--model.num_kv_groups {groups}: must divide num_heads {heads}; one of {legal}")
    if "S" in config.window_pattern and config.sliding_window is None:
        raise ConfigError("--model.window_pattern has S layers: give their size, e.g. --model.sliding_window 256")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ConfigError(f"--model.sliding_window {config.sliding_window}: must be 1 or more, e.g. 256")
    return replace(config, num_heads=heads, num_kv_groups=groups)


def _resolve_ffn(config: ModelConfig) -> ModelConfig:
    granule = config.ffn_granule
    ffn = config.ffn_size
    if ffn is None:
        thirds = 12 if config.activation == "relu2" else 8
        ffn = round_up(-(-config.hidden_size * thirds // 3), granule)
    if ffn % granule or ffn < granule:
        raise ConfigError(
            f"--model.ffn_size {ffn}: must be a multiple of ffn_granule {granule}; try {round_up(max(ffn, 1), granule)}"
        )
    return replace(config, ffn_size=ffn)


def _resolve_experts(config: ModelConfig, letters: Collection[str]) -> ModelConfig:
    if "E" not in letters:
        if config.num_experts:
            raise ConfigError(
                f"--model.num_experts {config.num_experts}: no E block has them; "
                f"add one, e.g. --model.block_pattern E, or leave the flag out"
            )
        return config
    if not config.num_experts:
        raise ConfigError("--model.block_pattern has E blocks: give --model.num_experts, e.g. 32")
    if config.experts_per_token > config.num_experts:
        raise ConfigError(
            f"--model.experts_per_token {config.experts_per_token}: there are {config.num_experts} experts; "
            f"try {min(4, config.num_experts)}"
        )
    granule = config.ffn_granule
    size = config.expert_ffn_size or round_up(config.hidden_size, granule)
    if size % granule:
        raise ConfigError(
            f"--model.expert_ffn_size {size}: must be a multiple of ffn_granule {granule}; "
            f"try {round_up(size, granule)}"
        )
    return replace(config, expert_ffn_size=size)


def _resolve_mamba(config: ModelConfig, letters: Collection[str]) -> ModelConfig:
    if "M" not in letters:
        return config
    if config.mamba_version == 1:
        if config.mamba_num_heads is not None or config.mamba_num_groups != 1:
            raise ConfigError("--model.mamba_version 1: has no heads or groups; leave mamba_num_heads and groups out")
        return config
    heads = config.mamba_num_heads
    if heads is None:
        inner = config.mamba_expand * config.hidden_size
        if inner % config.mamba_head_dim:
            raise ConfigError(
                f"--model.mamba_head_dim {config.mamba_head_dim}: must divide mamba_expand * hidden_size = {inner}; "
                f"give a divisor or --model.mamba_num_heads"
            )
        heads = inner // config.mamba_head_dim
    if heads % config.mamba_num_groups:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(f"--model.mamba_num_groups {config.mamba_num_groups}: must divide {heads} heads; {legal}")
    return replace(config, mamba_num_heads=heads)


def mamba_inner_size(config: ResolvedModel) -> int:
    """Channels inside a Mamba mixer of a resolved config."""
    if config.mamba_version == 1:
        return config.mamba_expand * config.hidden_size
    return config.mamba_num_heads * config.mamba_head_dim


def attention_windows(config: ResolvedModel) -> list[int | None]:
    """Per block: keys that its attention sees, None for all of them and for blocks without attention."""
    windows, seen = [], 0
    for letter in config.block_pattern:
        window = None
        if letter in "TE":
            local = config.window_pattern[seen % len(config.window_pattern)] == "S"
            window = config.sliding_window if local else None
            seen += 1
        windows.append(window)
    return windows
