"""The model: embedding, blocks by pattern, final norm, head. It never shards itself and keeps no plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows
from megatron_adamba.blueprint.stages import Chunk, specs_held, whole_model
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.plan import ElasticPlan, full_plan
from megatron_adamba.layers.block import build_block, static_norm
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.embedding import Head, TiedEmbedding, TokenEmbedding
from megatron_adamba.layers.lesson import Lesson
from megatron_adamba.layers.moe.layer import MoE
from megatron_adamba.layers.moe.statistics import RouterStatistics
from megatron_adamba.layers.norm import NestedNorm
from megatron_adamba.layers.rope import yarn_of
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.model.taps import Taps
from megatron_adamba.ops.attention import attention_mask, segment_positions
from megatron_adamba.ops.linear_cross_entropy import IGNORED
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.rotary import rotary_table
from megatron_adamba.parallel.expert import ALL_EXPERTS, ExpertParallel
from megatron_adamba.parallel.layout import cut
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


class AdambaModel(nn.Module):
    """An elastic hybrid language model. `config` is resolved (`blueprint.resolve`).

    Parameters are uninitialised until `initialize` or a checkpoint fills them. tp: the ranks that share each layer, ep:
    the ranks that share out experts; parameters are then this rank's shards. moe_layer: what to build mixtures of
    experts from. chunks: what of the model is here, None for all of it; the rest has no parameters and does not run.
    """

    embedding: TokenEmbedding
    """where it is held"""
    final_norm: NestedNorm
    """where the head is"""
    head: Head | None
    """None where the embedding serves, or another rank holds it"""

    def __init__(
        self,
        config: ResolvedModel,
        device=None,
        activation_checkpointing: bool = False,
        tp: TensorParallel = ALONE,
        ep: ExpertParallel = ALL_EXPERTS,
        moe_layer: type[MoE] = MoE,
        chunks: Sequence[Chunk] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp, self.ep = config, tp, ep
        self.chunks = (whole_model(config.num_layers),) if chunks is None else tuple(chunks)
        self.activation_checkpointing = activation_checkpointing
        self.rows = block_rows(config)
        self.windows = attention_windows(config)
        embedding_norm = (config.static_norm_size, config.norm_eps) if config.embedding_norm else None
        ends = (config.vocab_size, config.hidden_size)
        if config.tie_embeddings and self.holds("embedding.weight"):
            self.embedding = TiedEmbedding(*ends, embedding_norm, config.logit_softcap, tp, device)
        elif self.holds("embedding.weight"):
            self.embedding = TokenEmbedding(*ends, embedding_norm, tp, device)
        here = {index for chunk in self.chunks for index in chunk.blocks}
        self.blocks = nn.ModuleList(
            build_block(config, index, self.windows[index], tp, ep, moe_layer, device)
            if index in here
            else nn.Identity()
            for index in range(config.num_layers)
        )
        self.head = None
        if self.holds("head.weight"):
            self.final_norm = static_norm(config, tp, device)
            self.head = None if config.tie_embeddings else Head(*ends, config.logit_softcap, tp, device)

    def holds(self, name: str) -> bool:
        """Whether a parameter of the ends, by its name, is here."""
        return any(chunk.holds(name, self.config.tie_embeddings) for chunk in self.chunks)

    @property
    def specs(self) -> tuple[ParamSpec, ...]:
        """The manifest's part that is here."""
        return specs_held(manifest(self.config), self.chunks, self.config.tie_embeddings)

    def initialize(self, seed: int) -> AdambaModel:
        """Fill every parameter from (seed, its canonical name), whatever the layout. Returns self."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for spec in self.specs:
                parameters[spec.name].copy_(self.share(spec, initial_tensor(spec, seed)))
        return self

    def share(self, spec: ParamSpec, whole: Tensor) -> Tensor:
        """What this rank holds of a canonical tensor."""
        return cut(spec, whole, *self.share_of(spec))

    def share_of(self, spec: ParamSpec) -> tuple[int, int]:
        """How many ranks a parameter is cut into, and which part is this rank's."""
        ranks = self.ep if spec.unit == "expert" else self.tp
        return ranks.size, ranks.rank

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        plan: ElasticPlan | None = None,
        accumulation: Accumulation = Accumulation.DIRECT,
        all_take_part: bool = True,
        reduction: str = "mean",
        statistics: RouterStatistics | None = None,
        taps: Taps | None = None,
        share: Tensor | None = None,
        teaches: Lesson | None = None,
        learns: Lesson | None = None,
    ) -> Tensor:
        """Mean loss in nats (scalar), or logits [batch, seq, vocab] in fp32 where no labels are given.

        tokens, labels: [batch, seq] int64, label -100 unscored; seq_idx: [batch, seq] int32 document numbers or None;
        plan: None is full width to the last layer; all_take_part: blocks above the exit run on zero tokens, so that
        their parameters have a gradient of zero; statistics: filled by the routers, whose auxiliary losses are part of
        the mean loss; taps: filled by the pass, which then takes a mean loss; share: scalar, what the mean over the
        scored tokens counts in the step, beside routers' losses that count 1; None is 1; teaches: filled by the pass;
        learns: of the full pass of the same tokens, whose predictions are then a part of the mean loss; reduction
        "none" gives each position's loss, [batch, seq], without gradient.
        """
        plan = plan or full_plan(self.config)
        statistics = RouterStatistics() if statistics is None else statistics
        context = self.training_context(tokens, seq_idx, accumulation, statistics)
        chunk, lessons = self.chunks[0], (teaches, learns)
        out = self.run_chunk(chunk, None, tokens, labels, context, plan, all_take_part, reduction, taps, *lessons)
        if out.dim() > 1:
            return out
        return (out if share is None else out * share) + statistics.total()

    def run_chunk(
        self,
        chunk: Chunk,
        x: Tensor | None,
        tokens: Tensor,
        labels: Tensor | None,
        context: ForwardContext,
        plan: ElasticPlan,
        all_take_part: bool,
        reduction: str = "mean",
        taps: Taps | None = None,
        teaches: Lesson | None = None,
        learns: Lesson | None = None,
    ) -> Tensor:
        """A part of `forward`: the residual stream in (nothing where the embedding is) and out, behind the head what
        `forward` returns without the routers' losses. context: of `training_context` for these tokens."""
        if x is None or chunk.embedding:
            x = self.embedding(self.tp.pad_sequence(tokens, 0))
            if taps is not None:
                taps.behind(0, x, self.tp)
        x = self._run_blocks(x, chunk.blocks, plan, context, all_take_part, taps)
        if not chunk.head:
            return x
        normed = self.final_norm(x)
        if teaches is not None:
            teaches.teach(normed)
        if taps is None or labels is None or not plan.whole_depth:
            out = self._head(normed, self.tp.pad_sequence(labels, IGNORED), reduction, lesson=learns)
            return out[:, : tokens.shape[1]] if out.dim() > 1 else out
        padded = self.tp.pad_sequence(labels, IGNORED)
        losses = torch.empty(padded.shape, dtype=torch.float32, device=x.device)
        out = self._head(normed, padded, reduction, losses, learns)
        taps.token_losses = losses[:, : tokens.shape[1]]
        with torch.no_grad():
            exit_losses = lambda state, wanted: self._head(self.final_norm(state), wanted, "none")
            taps.finish(exit_losses, self.divergences, labels, self.tp)
        return out

    def _head(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        reduction: str = "mean",
        losses: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        if self.head is None:
            return self.embedding(x, labels, reduction, losses, lesson, as_head=True)
        return self.head(x, labels, reduction, losses, lesson)

    def hidden_states(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None,
        plan: ElasticPlan,
        accumulation: Accumulation = Accumulation.DIRECT,
        all_take_part: bool = False,
        statistics: RouterStatistics | None = None,
    ) -> Tensor:
        """Normed residual behind the plan's exit layer, [batch, seq, hidden_size] in the form of the residual stream.

        Under sequence parallelism the sequence is lengthened to what the ranks can share; causality keeps what is
        added out of what was there.
        """
        context = self.training_context(tokens, seq_idx, accumulation, statistics)
        x = self.embedding(self.tp.pad_sequence(tokens, 0))
        return self.final_norm(self._run_blocks(x, range(len(self.blocks)), plan, context, all_take_part))

    def _run_blocks(
        self,
        x: Tensor,
        blocks: range,
        plan: ElasticPlan,
        context: ForwardContext,
        all_take_part: bool,
        taps: Taps | None = None,
    ) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        gone = self._gone_early(plan, x, context)
        for index in blocks:
            block, row = self.blocks[index], self.rows[index][plan.widths[index]]
            if index >= plan.exit_layer:
                if all_take_part:
                    x = x + block(x[:0], row, self._empty(context)).sum()
                continue
            y = checkpoint(block, x, row, context, use_reentrant=False) if recompute else block(x, row, context)
            x = y if gone is None or index < gone[0] else torch.where(gone[1], x, y)
            if taps is not None:
                taps.behind(index + 1, x, self.tp)
        return x

    def _gone_early(self, plan: ElasticPlan, x: Tensor, context: ForwardContext) -> tuple[int, Tensor] | None:
        """The plan's mixed layer, and who leaves there, [seq, 1] bool of this rank's part of the sequence."""
        if plan.mixed is None:
            return None
        gone = self.tp.pad_sequence(plan.mixed.positions(context.length, x.device)[None], False)[0]
        if self.tp.sequence_parallel:
            gone = gone.chunk(self.tp.size)[self.tp.rank]
        return plan.mixed.layer, gone[:, None]

    def training_context(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None,
        accumulation: Accumulation = Accumulation.DIRECT,
        statistics: RouterStatistics | None = None,
    ) -> ForwardContext:
        """What the layers share in a pass over whole sequences: rotary tables and masks, by window."""
        length = tokens.shape[1]
        padded = length + (-length % self.tp.size if self.tp.sequence_parallel else 0)
        seq_idx = self.tp.pad_sequence(seq_idx, 2**31 - 1)
        positions = segment_positions(padded, 0, tokens.device)
        cos, sin = self.rotary(positions)
        windows = {window for window, letter in zip(self.windows, self.config.block_pattern) if letter in "TE"}
        masks = {window: attention_mask(positions, positions, window, seq_idx) for window in windows}
        statistics = RouterStatistics() if statistics is None else statistics
        return ForwardContext(accumulation, cos, sin, masks, seq_idx, length, statistics)

    def logits(self, x: Tensor) -> Tensor:
        """[batch, seq, vocab_size] in fp32 of residuals [batch, seq, hidden_size], whichever blocks they lie behind."""
        return self._head(self.final_norm(x))

    def divergences(self, states: Tensor) -> Tensor:
        """KL divergence in nats of the predictions at each state from those at the last, [states - 1, tokens], without
        gradient. states: residuals [states, tokens, hidden_size], whole on every rank, whichever blocks they lie
        behind."""
        return self._head(self.final_norm(states), reduction="divergence")

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary embedding at positions [n], [n, head_dim / 2] each in fp32."""
        config = self.config
        sizes = config.head_dim_steps or config.head_dim
        return rotary_table(positions, sizes, config.rope_theta, config.rope_sign, yarn_of(config))

    @staticmethod
    def _empty(context: ForwardContext) -> ForwardContext:
        """The context of a pass over zero tokens."""
        seq_idx = None if context.seq_idx is None else context.seq_idx[:0]
        masks = dict.fromkeys(context.masks)
        return replace(context, masks=masks, seq_idx=seq_idx, statistics=RouterStatistics())
