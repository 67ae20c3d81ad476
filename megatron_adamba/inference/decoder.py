"""Decoding with caches: every sequence in a slot, with widths of its own, every token with an exit of its own.

A token that has left goes no further, but later tokens find its keys and values, and a Mamba state that it moved on,
in all blocks that it skipped, computed from the residual that it left with. In blocks that may widen, a token leaves
keys and values of both widths, and a query reads those of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import expansion_layers
from megatron_adamba.config.model import NestRow
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.inference.kv_cache import InReach, KVCache, rows_of
from megatron_adamba.inference.policy import ComputePolicy, doubled_widths
from megatron_adamba.layers.attention import NestedAttention
from megatron_adamba.layers.block import AttentionBlock, ExpertBlock, MambaBlock
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.gates import Gates
from megatron_adamba.layers.mamba import MambaState
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.attention import attention_mask
from megatron_adamba.ops.nested_linear import Accumulation


@dataclass(frozen=True)
class Decoded:
    """What came of the tokens that were fed."""

    logits: Tensor
    """[sequences, vocab_size] fp32, behind each one's last token"""
    exit_layers: Tensor
    """[tokens] int64 blocks that ran"""
    widened_at: Tensor
    """[tokens] int64 first block at the doubled width, the number of blocks for none"""


class Decoder:
    """Holds the caches of `slots` sequences of at most `capacity` tokens each, and their policies.

    gates, reading: needed by adaptive policies alone.
    """

    def __init__(
        self,
        model: AdambaModel,
        slots: int,
        capacity: int,
        gates: Gates | None = None,
        reading: GateReading | None = None,
    ) -> None:
        self.model, self.gates, self.reading, self.capacity = model, gates, reading, capacity
        self.lengths = [0] * slots
        self.policies: dict[int, ComputePolicy] = {}
        config, weight = model.config, model.embedding.weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        self.widening = expansion_layers(config)
        self.narrow: dict[int, KVCache] = {}
        self.wide: dict[int, KVCache] = {}
        self.states: dict[int, MambaState] = {}
        for index, letter in enumerate(config.block_pattern):
            if letter == "M":
                mixer = cast(MambaBlock, model.blocks[index]).mixer
                self.states[index] = mixer.new_state(slots, device=weight.device)
                continue
            for sets in (self.narrow, self.wide) if index in self.widening else (self.narrow,):
                sets[index] = KVCache(slots, config.head_dim, model.windows[index], capacity, **kind)

    @property
    def cache_bytes(self) -> int:
        """Of keys, values and states that are held now."""
        states = sum(t.numel() * t.element_size() for s in self.states.values() for t in (s.conv_state, s.ssm_state))
        return states + sum(cache.num_bytes for sets in (self.narrow, self.wide) for cache in sets.values())

    def begin(self, slot: int, policy: ComputePolicy) -> None:
        """A new sequence, of no tokens yet."""
        assert policy.adaptive is None or self.gates is not None
        self.policies[slot], self.lengths[slot] = policy, 0
        for cache in (*self.narrow.values(), *self.wide.values()):
            cache.clear(slot)
        for state in self.states.values():
            state.conv_state[slot] = 0
            state.ssm_state[slot] = 0

    def change_policy(self, slot: int, policy: ComputePolicy) -> None:
        """From the next token on; what earlier tokens did not compute stays hidden from later ones."""
        # blocks that did not run have left no state behind
        assert self.policies[slot].plan.exit_layer == policy.plan.exit_layer
        self.policies[slot] = policy

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor) -> Decoded:
        """The next tokens of one sequence, [n] int64, at least one."""
        start = self.lengths[slot]
        assert 0 < tokens.shape[0] <= self.capacity - start
        positions = torch.arange(start, start + tokens.shape[0], device=tokens.device)
        decoded = _Pass(self, [slot], tokens, positions, start).run()
        self.lengths[slot] += tokens.shape[0]
        return decoded

    @torch.no_grad()
    def step(self, slots: Sequence[int], tokens: Tensor) -> Decoded:
        """One further token each of several sequences, [slots] int64."""
        assert all(self.lengths[slot] < self.capacity for slot in slots)
        positions = torch.tensor([self.lengths[slot] for slot in slots], device=tokens.device)
        decoded = _Pass(self, list(slots), tokens, positions, None).run()
        for slot in slots:
            self.lengths[slot] += 1
        return decoded


@dataclass
class _Set:
    """Tokens of one width group that read one of its two sets of keys and values."""

    row: NestRow
    normed: Tensor
    """[group, w]"""
    cache: KVCache
    before: InReach | None
    own: tuple[Tensor, Tensor]
    """keys and values of the group's tokens, [kv_groups, group, head_dim]"""


class _Pass:
    """Tokens on their way through the blocks: many of one sequence, or one each of many."""

    def __init__(
        self, decoder: Decoder, slots: list[int], tokens: Tensor, positions: Tensor, start: int | None
    ) -> None:
        """start: position of the first of one sequence's tokens; None where each token has a sequence of its own."""
        self.decoder, self.model = decoder, decoder.model
        self.slots, self.positions, self.start = slots, positions, start
        config = self.model.config
        self.depth = config.num_layers
        self.policies = [decoder.policies[slot] for slot in slots]
        self.widths = [policy.plan.widths for policy in self.policies]
        self.doubled = [
            doubled_widths(config, widths) if policy.adaptive is not None else widths
            for policy, widths in zip(self.policies, self.widths)
        ]
        self.last_block = max(policy.plan.exit_layer for policy in self.policies)
        count = tokens.shape[0]
        self.cos, self.sin = self.model.rotary(positions)
        self.context = ForwardContext(Accumulation.DIRECT, self.cos, self.sin, {}, None, count)
        self.x = self.model.embedding(tokens[None])[0]
        hard = [policy.plan.exit_layer for policy in self.policies]
        self.exit_layers = torch.tensor(hard if start is None else hard * count, device=tokens.device)
        self.widened_at = torch.full_like(self.exit_layers, self.depth)
        self.left = torch.zeros(count, dtype=torch.bool, device=tokens.device)
        self.some_left = self.all_left = self.some_wide = False

    def run(self) -> Decoded:
        for index in range(self.last_block):
            if self.model.config.block_pattern[index] == "M":
                self._mamba_block(index)
            else:
                self._attention_block(index)
            if index + 1 < self.last_block:
                self._ask_gates(index + 1)
        x = self.x if self.start is None else self.x[-1:]
        logits = self.model.logits(x[:, None])[:, 0]
        return Decoded(logits, self.exit_layers, self.widened_at)

    def _ask_gates(self, run: int) -> None:
        """Who leaves behind `run` blocks, and who widens."""
        decoder = self.decoder
        for policy, tokens in self._by(lambda place: self.policies[place].adaptive):
            if policy is None or self.all_left:
                continue
            # a sequence may hold to an exit of its own below the others'
            going = ~self.left[tokens] & (self.exit_layers[tokens] > run)
            x = self.x[tokens]
            if run >= policy.min_exit_layer and policy.exit_threshold < 1:
                # where each token is a sequence of its own, each decides for itself
                own = replace(policy, exit_per="token") if self.start is None else policy
                leaves = own.leaves(decoder.gates, decoder.reading, run, x) & going
                if bool(leaves.any()):
                    self.exit_layers[tokens] = torch.where(leaves, run, self.exit_layers[tokens])
                    self.left[tokens] |= leaves
                    self.some_left, self.all_left = True, bool(self.left.all())
                    going &= ~leaves
            if run in decoder.widening:
                grows = policy.widens(decoder.gates, decoder.reading, run, x) & going
                grows &= self.widened_at[tokens] == self.depth
                if bool(grows.any()):
                    self.widened_at[tokens] = torch.where(grows, run, self.widened_at[tokens])
                    self.some_wide = True

    def _mamba_block(self, index: int) -> None:
        block, state = cast(MambaBlock, self.model.blocks[index]), self.decoder.states[index]
        going = [place for place, policy in enumerate(self.policies) if policy.plan.exit_layer > index]
        rows = rows_of([self.slots[place] for place in going], self.x.device)
        here = slice(None) if self.start is not None else rows_of(going, self.x.device)
        own = MambaState(state.conv_state[rows], state.ssm_state[rows])
        x = self.x[here]
        kept = torch.nonzero(~self.left[here]).squeeze(1) if self.some_left else None
        normed = block.mixer_norm(x)
        normed = normed[:, None] if self.start is None else normed[None]
        out = block.mixer.decode(normed, own, kept)
        if not isinstance(rows, slice):
            state.conv_state[rows], state.ssm_state[rows] = own.conv_state, own.ssm_state
        if kept is None:
            self.x[here] += out
        else:
            self.x[torch.arange(self.x.shape[0], device=x.device)[here][kept]] += out
        if block.mlp is None:
            return
        for row, wide_row, tokens in self._groups(index):
            for own_row, inside in zip((row, wide_row or row), self._going(tokens, index, wide_row not in (None, row))):
                if inside is not None:
                    place = self._places(tokens, inside)
                    head = self.x[place, : own_row.width]
                    self.x[place, : own_row.width] = (
                        head + block.mlp(block.mlp_norm(head[None]), own_row, self.context)[0]
                    )

    def _attention_block(self, index: int) -> None:
        block = cast("AttentionBlock | ExpertBlock", self.model.blocks[index])
        for row, wide_row, tokens in self._groups(index):
            sets = [self._fill(index, row, self.decoder.narrow[index], tokens)]
            if wide_row not in (None, row):
                sets.append(self._fill(index, wide_row, self.decoder.wide[index], tokens))
            elif wide_row is not None:
                # a later turn may be narrower and widen
                self._keep(self.decoder.wide[index], tokens, *sets[0].own)
            for one, inside in zip(sets, self._going(tokens, index, len(sets) > 1)):
                if inside is None:
                    continue
                place, width = self._places(tokens, inside), one.row.width
                head = self.x[place, :width] + self._read(block.attention, one, tokens, inside)
                if isinstance(block, ExpertBlock):
                    head += block.moe(block.moe_norm(head[None]), one.row, self.context)[0]
                else:
                    head += block.mlp(block.mlp_norm(head[None]), one.row, self.context)[0]
                self.x[place, :width] = head

    def _fill(self, index: int, row: NestRow, cache: KVCache, tokens: slice | Tensor) -> _Set:
        """Keys and values of all tokens of a group, left or not, at one width, into their cache."""
        block = cast("AttentionBlock | ExpertBlock", self.model.blocks[index])
        normed = block.attention_norm(self.x[tokens, : row.width])
        cos, sin = self.cos[tokens], self.sin[tokens]
        keys, values = (t[0].transpose(0, 1) for t in block.attention.keys_values(normed[None], row, cos, sin))
        before = cache.read_before(self.slots[0], row.kv_groups, self.start) if self.start else None
        self._keep(cache, tokens, keys, values)
        return _Set(row, normed, cache, before, (keys, values))

    def _keep(self, cache: KVCache, tokens: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Of a group's tokens, [kv_groups, group, head_dim]."""
        if self.start is not None:
            cache.write_sequence(self.slots[0], self.start, keys, values)
            return
        slots = self._slots_of(tokens)
        cache.write(slots, [self.decoder.lengths[slot] for slot in slots], self.positions[tokens], keys, values)

    def _read(self, attention: NestedAttention, one: _Set, tokens: slice | Tensor, inside: slice | Tensor) -> Tensor:
        """What the queries of some of a group's tokens find, [inside, w]."""
        cos, sin = self.cos[tokens][inside], self.sin[tokens][inside]
        queries = attention.queries(one.normed[inside][None], one.row, cos, sin)[0]
        positions = self.positions[tokens][inside]
        if self.start is not None:
            keys, values, mask = self._sequence_in_reach(one, positions, attention.heads_per_group)
            return attention.read(queries[None], keys, values, mask, one.row)[0]
        slots = self._slots_of(self._places(tokens, inside))
        lengths = [self.decoder.lengths[slot] + 1 for slot in slots]
        reach = one.cache.read(slots, one.row.kv_groups, positions, min(lengths), max(lengths))
        mask = reach.mask(positions[:, None], None, attention.heads_per_group)
        return attention.read_cache(queries, reach.keys, reach.values, reach.used, mask, one.row)

    def _sequence_in_reach(self, one: _Set, queries: Tensor, heads_per_group: int):
        """Keys and values that queries of one sequence see, [1, keys, kv_groups, head_dim] each, and the mask."""
        if one.before is not None:
            reach = one.before.followed_by(*one.own, self.positions)
            keys, values = (t.permute(1, 2, 0, 3) for t in (reach.keys, reach.values))
            return keys, values, reach.mask(queries[None], one.cache.window, heads_per_group)
        keys, values = (t.transpose(0, 1)[None] for t in one.own)
        if queries.shape[0] == self.positions.shape[0] and one.cache.window is None:
            return keys, values, None
        return keys, values, attention_mask(queries, self.positions, one.cache.window, None)

    def _groups(self, index: int) -> list[tuple[NestRow, NestRow | None, slice | Tensor]]:
        """Tokens of the same width in a block that their sequences run: (row, row of widened ones, tokens). None where
        nobody can widen."""
        rows, may_widen = self.model.rows[index], index in self.decoder.widening

        def widths(place: int) -> tuple[int, int | None] | None:
            policy = self.policies[place]
            if policy.plan.exit_layer <= index:
                return None
            adaptive = may_widen and policy.adaptive is not None
            return self.widths[place][index], self.doubled[place][index] if adaptive else None

        groups = []
        for key, tokens in self._by(widths):
            if key is not None:
                row, wide_row = rows[key[0]], None if key[1] is None else rows[key[1]]
                same = wide_row is not None and wide_row.width == row.width
                groups.append((row, row if same else wide_row, tokens))
        return groups

    def _by(self, key) -> list[tuple]:
        """Tokens whose sequences share key(place of the sequence): (key, their index)."""
        if self.start is not None:
            return [(key(0), slice(None))]
        found: dict = {}
        for place in range(len(self.slots)):
            found.setdefault(key(place), []).append(place)
        return [(value, rows_of(places, self.x.device)) for value, places in found.items()]

    def _slots_of(self, tokens: slice | Tensor) -> list[int]:
        return self.slots[tokens] if isinstance(tokens, slice) else [self.slots[place] for place in tokens.tolist()]

    def _places(self, tokens: slice | Tensor, inside: slice | Tensor) -> slice | Tensor:
        """Among all tokens, of some of a group's."""
        if isinstance(inside, slice):
            return tokens
        return torch.arange(self.x.shape[0], device=self.x.device)[tokens][inside]

    def _going(self, tokens: slice | Tensor, index: int, split: bool) -> tuple[slice | Tensor | None, ...]:
        """Places, inside a group, of its tokens that run a block, None for none: all together, or (narrow ones,
        widened ones)."""
        if not self.some_left and not (split and self.some_wide):
            return slice(None), None
        going = ~self.left[tokens]
        parts: tuple[Tensor, ...] = (going,)
        if split:
            wide = self.widened_at[tokens] <= index
            parts = going & ~wide, going & wide
        found = [torch.nonzero(part).squeeze(1) for part in parts]
        return tuple(part if part.numel() else None for part in found)
