"""The model: embedding, blocks by pattern, final norm, head. It never shards itself and keeps no plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import attention_windows
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.elastic.plan import ElasticPlan, full_plan
from megatron_adamba.layers.block import build_block, static_norm
from megatron_adamba.layers.cache import KVCache
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.embedding import Head, TiedEmbedding, TokenEmbedding
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.ops.attention import attention_mask, segment_positions
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.rotary import rotary_table


class AdambaModel(nn.Module):
    """An elastic hybrid language model. `config` is resolved (`blueprint.resolve`).

    Parameters are uninitialised until `initialize` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig, device=None, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.rows = {row.width: row for row in config.nest}
        self.windows = attention_windows(config)
        embedding_eps = config.norm_eps if config.embedding_norm else None
        ends = (config.vocab_size, config.hidden_size)
        if config.tie_embeddings:
            self.embedding = TiedEmbedding(*ends, embedding_eps, config.logit_softcap, device)
        else:
            self.embedding = TokenEmbedding(*ends, embedding_eps, device)
        self.blocks = nn.ModuleList(
            build_block(config, index, self.windows[index], device) for index in range(config.num_layers)
        )
        self.final_norm = static_norm(config, device)
        self.head = None if config.tie_embeddings else Head(*ends, config.logit_softcap, device)

    def initialize(self, seed: int) -> AdambaModel:
        """Fill every parameter from (seed, its canonical name). Returns self."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for spec in manifest(self.config):
                parameters[spec.name].copy_(initial_tensor(spec, seed))
        return self

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        plan: ElasticPlan | None = None,
        accumulation: Accumulation = Accumulation.DIRECT,
        all_take_part: bool = True,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean loss in nats (scalar), or logits [batch, seq, vocab] in fp32 where no labels are given.

        tokens, labels: [batch, seq] int64, label -100 unscored; seq_idx: [batch, seq] int32 document numbers or None;
        plan: None is full width to the last layer; all_take_part: blocks above the exit run on zero tokens, so that
        their parameters have a gradient of zero; reduction "none" gives each position's loss, [batch, seq], without
        gradient.
        """
        plan = plan or full_plan(self.config)
        x = self.hidden_states(tokens, seq_idx, plan, accumulation, all_take_part)
        return self._head(x, labels, reduction)

    def _head(self, x: Tensor, labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if self.head is None:
            return self.embedding(x, labels, reduction, as_head=True)
        return self.head(x, labels, reduction)

    def hidden_states(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None,
        plan: ElasticPlan,
        accumulation: Accumulation = Accumulation.DIRECT,
        all_take_part: bool = False,
    ) -> Tensor:
        """Normed residual behind the plan's exit layer, [batch, seq, hidden_size]."""
        context = self.make_context(tokens.shape[1], 0, tokens.device, seq_idx, accumulation)
        x = self.embedding(tokens)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            row = self.rows[plan.widths[index]]
            if index >= plan.exit_layer:
                if all_take_part:
                    x = x + block(x[:0], row, self._empty(context)).sum()
            elif recompute:
                x = checkpoint(block, x, row, context, use_reentrant=False)
            else:
                x = block(x, row, context)
        return self.final_norm(x)

    def forward_cached(self, tokens: Tensor, plan: ElasticPlan, caches: list) -> Tensor:
        """Continue from caches (one per block, as `inference` makes them): logits of the last position.

        tokens: [batch, new]; returns [batch, vocab_size] in fp32 and moves the caches on.
        """
        start = next((cache.length for cache in caches if isinstance(cache, KVCache)), 0)
        context = self.make_context(tokens.shape[1], start, tokens.device, None, Accumulation.DIRECT)
        x = self.embedding(tokens)
        for index in range(plan.exit_layer):
            x = self.blocks[index](x, self.rows[plan.widths[index]], context, caches[index])
        return self._head(self.final_norm(x[:, -1:]))[:, 0]

    def make_context(
        self, length: int, start: int, device, seq_idx: Tensor | None, accumulation: Accumulation
    ) -> ForwardContext:
        """Rotary tables and masks of positions start .. start + length - 1 over all positions up to there."""
        config = self.config
        positions = segment_positions(length, start, device)
        keys = segment_positions(start + length, 0, device)
        cos, sin = rotary_table(positions, config.head_dim, config.rope_theta, config.rope_sign)
        windows = {window for window, letter in zip(self.windows, config.block_pattern) if letter == "T"}
        masks = {window: attention_mask(positions, keys, window, seq_idx) for window in windows}
        return ForwardContext(accumulation=accumulation, cos=cos, sin=sin, masks=masks, seq_idx=seq_idx)

    @staticmethod
    def _empty(context: ForwardContext) -> ForwardContext:
        """The context of a pass over zero tokens."""
        seq_idx = None if context.seq_idx is None else context.seq_idx[:0]
        masks = dict.fromkeys(context.masks)
        return ForwardContext(context.accumulation, context.cos, context.sin, masks, seq_idx)
