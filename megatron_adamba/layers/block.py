"""Blocks: norms, mixers and MLPs around the residual stream, of which an elastic part touches a prefix only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.blueprint.nest import block_config
from megatron_adamba.blueprint.resolve import mamba_inner_size
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.layers.attention import NestedAttention
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.mamba import Mamba1Mixer, Mamba2Mixer
from megatron_adamba.layers.mlp import NestedMLP
from megatron_adamba.layers.moe.layer import MoE
from megatron_adamba.layers.norm import NestedNorm
from megatron_adamba.parallel.expert import ALL_EXPERTS, ExpertParallel
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


def nested_norm(config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> NestedNorm:
    """The norm in front of an elastic sub-layer: one gain and one norm_size per width."""
    sizes = [row.norm_size for row in config.nest]
    return NestedNorm(config.widths, sizes, config.norm_eps, config.norm_weight, tp, device)


def static_norm(config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> NestedNorm:
    """The norm in front of a static part: full width, one gain."""
    sizes = [config.static_norm_size]
    return NestedNorm([config.hidden_size], sizes, config.norm_eps, config.norm_weight, tp, device)


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

    def __init__(self, config: ResolvedModel, window: int | None, tp: TensorParallel = ALONE, device=None) -> None:
        super().__init__()
        self.attention_norm = nested_norm(config, tp, device)
        self.attention = NestedAttention(config, window, tp, device)
        self.mlp_norm = nested_norm(config, tp, device)
        self.mlp = NestedMLP(config, tp, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, at least row.width], this rank's part of the sequence under sequence parallelism."""
        head, tail = split_prefix(x, row.width)
        head = head + self.attention(self.attention_norm(head), row, context)
        head = head + self.mlp(self.mlp_norm(head), row, context)
        return join_prefix(head, tail)


class ExpertBlock(nn.Module):
    """E: x[:w] += attention(norm(x[:w])); x[:w] += moe(norm(x[:w]))."""

    def __init__(
        self,
        config: ResolvedModel,
        index: int,
        window: int | None,
        tp: TensorParallel = ALONE,
        ep: ExpertParallel = ALL_EXPERTS,
        moe_layer: type[MoE] = MoE,
        device=None,
    ) -> None:
        super().__init__()
        self.attention_norm = nested_norm(config, tp, device)
        self.attention = NestedAttention(config, window, tp, device)
        self.moe_norm = nested_norm(config, tp, device)
        self.moe = moe_layer(config, index, tp, ep, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, at least row.width]; returns the same shape."""
        head, tail = split_prefix(x, row.width)
        head = head + self.attention(self.attention_norm(head), row, context)
        head = head + self.moe(self.moe_norm(head), row, context)
        return join_prefix(head, tail)


class MambaBlock(nn.Module):
    """M: x += mamba(norm(x)) at full width, then an optional elastic MLP on x[:w]."""

    def __init__(self, config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> None:
        super().__init__()
        self.mixer_norm = static_norm(config, tp, device)
        self.mixer = build_mixer(config, tp, device)
        self.mlp: NestedMLP | None = None
        if config.mamba_use_mlp:
            self.mlp_norm = nested_norm(config, tp, device)
            self.mlp = NestedMLP(config, tp, device)

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, hidden_size]; returns the same shape."""
        x = x + self.mixer(self.mixer_norm(x), seq_idx=context.seq_idx)
        if self.mlp is None:
            return x
        head, tail = split_prefix(x, row.width)
        head = head + self.mlp(self.mlp_norm(head), row, context)
        return join_prefix(head, tail)


def build_mixer(config: ResolvedModel, tp: TensorParallel = ALONE, device=None) -> Mamba1Mixer | Mamba2Mixer:
    """The Mamba mixer that the config asks for, uninitialised; of its groups (Mamba-1: channels) this rank's share."""
    if config.mamba_version == 1:
        return Mamba1Mixer(
            hidden_size=config.hidden_size,
            d_state=config.mamba_d_state,
            d_conv=config.mamba_d_conv,
            d_inner=mamba_inner_size(config) // tp.size,
            tp=tp,
            device=device,
        )
    return Mamba2Mixer(
        hidden_size=config.hidden_size,
        d_state=config.mamba_d_state,
        d_conv=config.mamba_d_conv,
        head_dim=config.mamba_head_dim,
        num_heads=config.mamba_num_heads // tp.size,
        num_groups=config.mamba_num_groups // tp.size,
        chunk_size=config.mamba_chunk_size,
        norm_eps=config.norm_eps,
        tp=tp,
        device=device,
    )


def build_block(
    config: ResolvedModel,
    index: int,
    window: int | None,
    tp: TensorParallel = ALONE,
    ep: ExpertParallel = ALL_EXPERTS,
    moe_layer: type[MoE] = MoE,
    device=None,
) -> nn.Module:
    """Block `index` of the pattern; moe_layer: what to build mixtures of experts from."""
    config = block_config(config, index)
    if config.block_pattern[index] == "T":
        return AttentionBlock(config, window, tp, device)
    if config.block_pattern[index] == "E":
        return ExpertBlock(config, index, window, tp, ep, moe_layer, device)
    return MambaBlock(config, tp, device)
