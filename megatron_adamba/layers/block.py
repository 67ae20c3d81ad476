"""Blocks: norms, mixers and MLPs around the residual stream, of which an elastic part touches a prefix only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.blueprint.resolve import mamba_inner_size
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.attention import NestedAttention
from megatron_adamba.layers.cache import KVCache
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.mamba import Mamba1Mixer, Mamba2Mixer, MambaState
from megatron_adamba.layers.mlp import NestedMLP
from megatron_adamba.layers.norm import NestedNorm


def nested_norm(config: ModelConfig, device=None) -> NestedNorm:
    """The norm in front of an elastic sub-layer: one gain and one norm_size per width."""
    sizes = [row.norm_size for row in config.nest]
    return NestedNorm(config.widths, sizes, config.norm_eps, config.norm_weight, device)


def static_norm(config: ModelConfig, device=None) -> NestedNorm:
    """The norm in front of a static part: full width, one gain."""
    sizes = [config.static_norm_size]
    return NestedNorm([config.hidden_size], sizes, config.norm_eps, config.norm_weight, device)


def split_prefix(x: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The leading channels and the rest (None when there is none); one copy in backward, none in forward."""
    if width == x.shape[-1]:
        return x, None
    head, tail = torch.split(x, [width, x.shape[-1] - width], dim=-1)
    return head, tail


def join_prefix(head: Tensor, tail: Tensor | None) -> Tensor:
    return head if tail is None else torch.cat([head, tail], dim=-1)


class AttentionBlock(nn.Module):
    """T: x[:w] += attention(norm(x[:w])); x[:w] += mlp(norm(x[:w]))."""

    def __init__(self, config: ModelConfig, window: int | None, device=None) -> None:
        super().__init__()
        self.attention_norm = nested_norm(config, device)
        self.attention = NestedAttention(config, window, device)
        self.mlp_norm = nested_norm(config, device)
        self.mlp = NestedMLP(config, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext, cache: KVCache | None = None) -> Tensor:
        """x: [batch, seq, at least row.width]; returns the same shape."""
        head, tail = split_prefix(x, row.width)
        head = head + self.attention(self.attention_norm(head), row, context, cache)
        head = head + self.mlp(self.mlp_norm(head), row, context)
        return join_prefix(head, tail)


class MambaBlock(nn.Module):
    """M: x += mamba(norm(x)) at full width, then an optional elastic MLP on x[:w]."""

    def __init__(self, config: ModelConfig, device=None) -> None:
        super().__init__()
        self.mixer_norm = static_norm(config, device)
        self.mixer = build_mixer(config, device)
        if config.mamba_use_mlp:
            self.mlp_norm = nested_norm(config, device)
            self.mlp = NestedMLP(config, device)
        else:
            self.mlp_norm = self.mlp = None

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext, cache: MambaState | None = None) -> Tensor:
        """x: [batch, seq, hidden_size]; returns the same shape."""
        x = x + self.mixer(self.mixer_norm(x), seq_idx=context.seq_idx, cache=cache)
        if self.mlp is None:
            return x
        head, tail = split_prefix(x, row.width)
        head = head + self.mlp(self.mlp_norm(head), row, context)
        return join_prefix(head, tail)


def build_mixer(config: ModelConfig, device=None) -> nn.Module:
    """The Mamba mixer that the config asks for, uninitialised."""
    if config.mamba_version == 1:
        return Mamba1Mixer(
            hidden_size=config.hidden_size,
            d_state=config.mamba_d_state,
            d_conv=config.mamba_d_conv,
            expand=config.mamba_expand,
            device=device,
        )
    return Mamba2Mixer(
        hidden_size=config.hidden_size,
        d_state=config.mamba_d_state,
        d_conv=config.mamba_d_conv,
        expand=mamba_inner_size(config) / config.hidden_size,
        head_dim=config.mamba_head_dim,
        num_heads=config.mamba_num_heads,
        num_groups=config.mamba_num_groups,
        chunk_size=config.mamba_chunk_size,
        norm_eps=config.norm_eps,
        device=device,
    )


def build_block(config: ModelConfig, index: int, window: int | None, device=None) -> nn.Module:
    """Block `index` of the pattern."""
    if config.block_pattern[index] == "T":
        return AttentionBlock(config, window, device)
    return MambaBlock(config, device)
