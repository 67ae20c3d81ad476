"""Keys and values of one attention layer for several sequences, each in a slot; a ring where a window bounds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_ROOM = 64
"""places that are added when they run out, at least"""


@dataclass(frozen=True)
class InReach:
    """What queries of some sequences can see."""

    keys: Tensor
    """[kv_groups, sequences, at least `used` places, head_dim]"""
    values: Tensor
    used: int
    """places that are read"""
    positions: Tensor | None
    """[sequences, used] int64, negative where a place holds nothing; None: place i holds position i, for all"""
    held: Tensor | None
    """[sequences, used] int64 KV groups that are held there; None: at least as many as are read"""

    all_seen: bool = False
    """each of its one query sees all of it"""

    def mask(self, queries: Tensor, window: int | None, heads_per_group: int) -> Tensor | None:
        """[sequences, 1 or heads, q, used] bool, None where all is seen; queries: [sequences, q] positions."""
        if self.all_seen and self.held is None:
            return None
        positions = self._places()
        back = queries[:, :, None] - positions[:, None]
        seen = (back >= 0) & (positions >= 0)[:, None]
        if window is not None:
            seen &= back < window
        if self.held is None:
            return seen[:, None]
        groups = torch.arange(self.keys.shape[0], device=queries.device).repeat_interleave(heads_per_group)
        return seen[:, None] & (self.held[:, None] > groups[:, None])[:, :, None]

    def _places(self) -> Tensor:
        """`positions`, written out."""
        if self.positions is None:
            return torch.arange(self.used, device=self.keys.device)[None]
        return self.positions

    def followed_by(self, keys: Tensor, values: Tensor, positions: Tensor) -> InReach:
        """With the next tokens of its one sequence, [kv_groups, n, head_dim], at positions [n], all held."""
        held = self.held
        if held is not None:
            held = torch.cat([held, held.new_full((1, keys.shape[1]), keys.shape[0])], dim=1)
        return InReach(
            torch.cat([self.keys, keys[:, None]], dim=2),
            torch.cat([self.values, values[:, None]], dim=2),
            self.used + keys.shape[1],
            torch.cat([self._places(), positions[None]], dim=1),
            held,
        )


class KVCache:
    """Position p of a sequence lies at place p, or at p modulo the window where there is one. The KV groups held may
    differ from token to token: those that a token did not compute are never read, as if it were not there."""

    def __init__(self, slots: int, head_dim: int, window: int | None, capacity: int, dtype, device) -> None:
        """window: keys that a query sees, itself included; capacity: tokens of the longest sequence."""
        self.window, self.limit = window, capacity if window is None else min(window, capacity)
        self.keys = torch.empty(0, slots, 0, head_dim, dtype=dtype, device=device)
        """[kv_groups, slots, places, head_dim]: what fewer groups read of all slots lies together"""
        self.values = self.keys
        self.fewest: list[int | None] = [None] * slots
        """KV groups that every token of a sequence has; None for no tokens"""
        self.lengths = [0] * slots
        """position that is next; what a sequence leaves out before it writes again is held by nobody"""
        self.held: Tensor | None = None
        """[slots, places] int64 KV groups; made when they first differ within a sequence"""

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def clear(self, slot: int) -> None:
        self.fewest[slot], self.lengths[slot] = None, 0

    def write(self, slots: list[int], starts: list[int], positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """One token each of several sequences, [kv_groups, n, head_dim], at positions [n], which starts repeat."""
        groups = keys.shape[0]
        self._make_room(groups, min(max(starts) + 1, self.limit))
        for slot, start in zip(slots, starts):
            self._note(slot, start, 1, groups)
        rows = rows_of(slots, self.keys.device)
        if isinstance(rows, slice) and min(starts) == max(starts):
            places: int | Tensor = starts[0] % self.limit
        else:
            rows, places = torch.tensor(slots, device=positions.device), positions % self.limit
        self._store(groups, (rows, places), keys, values)

    def write_sequence(self, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Tokens start .. start + n - 1 of one sequence, [kv_groups, n, head_dim]."""
        groups, count = keys.shape[:2]
        self._make_room(groups, min(start + count, self.limit))
        self._note(slot, start, count, groups)
        kept = min(count, self.limit)
        places = torch.arange(start + count - kept, start + count, device=keys.device) % self.limit
        self._store(groups, (slot, places), keys[:, count - kept :], values[:, count - kept :])

    def read(self, slots: list[int], groups: int, last: Tensor, shortest: int, longest: int) -> InReach:
        """For one query each of several sequences that stands at position last, [n], the last one written.

        shortest, longest: the least and the greatest of them + 1.
        """
        used = min(longest, self.limit)
        if len(slots) == self.keys.shape[1] and slots == list(range(len(slots))):
            rows: slice | Tensor = slice(None)
            keys, values = self.keys[:groups], self.values[:groups]
        else:
            rows = torch.tensor(slots, device=self.keys.device)
            keys, values = (t[:groups, rows, :used] for t in (self.keys, self.values))
        positions = None
        if longest > self.limit:
            place = torch.arange(used, device=last.device)
            positions = last[:, None] - (last[:, None] - place) % self.limit
        held = self._held(slots, groups, rows, slice(used))
        return InReach(keys, values, used, positions, held, all_seen=shortest >= used)

    def read_before(self, slot: int, groups: int, start: int) -> InReach:
        """What of one sequence's tokens before `start` its later tokens can see, oldest first."""
        self._make_room(groups, min(start, self.limit))
        self._note(slot, start, 0, groups)
        first = 0 if self.window is None else max(0, start - self.limit)
        positions = torch.arange(first, start, device=self.keys.device)
        places = positions % self.limit
        keys, values = (t[:groups, slot, places][:, None] for t in (self.keys, self.values))
        held = self._held([slot], groups, slot, places)
        return InReach(keys, values, start - first, positions[None], held)

    def _held(self, slots: list[int], groups: int, rows, places) -> Tensor | None:
        fewest = [self.fewest[slot] or 0 for slot in slots]
        if min(fewest) >= groups:
            return None
        if self.held is None:
            # all tokens of each have as many, but fewer than are asked for
            count = self.keys[0, 0, places].shape[0]
            return torch.tensor(fewest, device=self.keys.device)[:, None].expand(-1, count)
        held = self.held[rows, places]
        return held if held.dim() == 2 else held[None]

    def _store(self, groups: int, where: tuple, keys: Tensor, values: Tensor) -> None:
        self.keys[(slice(groups), *where)] = keys
        self.values[(slice(groups), *where)] = values
        if self.held is not None:
            self.held[where] = groups

    def _note(self, slot: int, start: int, count: int, groups: int) -> None:
        """Before tokens start .. start + count - 1 are written with so many groups, or, for none, before a read."""
        first, before = self.lengths[slot], self.fewest[slot]
        missing = start > first
        if count and before is not None and before != groups:
            self._told_apart()
        if missing:
            gap = torch.arange(max(first, start - self.limit), start, device=self.keys.device)
            self._told_apart()[slot, gap % self.limit] = 0
            before = 0
        if count:
            before = groups if before is None else min(before, groups)
        self.fewest[slot], self.lengths[slot] = before, start + count

    def _told_apart(self) -> Tensor:
        """`held`, made where it was not."""
        if self.held is None:
            own = torch.tensor([fewest or 0 for fewest in self.fewest], device=self.keys.device)
            self.held = own[:, None].expand(self.keys.shape[1:3]).clone()
        return self.held

    def _make_room(self, groups: int, places: int) -> None:
        had_groups, slots, had_places, head_dim = self.keys.shape
        if places <= had_places and groups <= had_groups:
            return
        if places > had_places:
            # a query may read what is not used yet, so there is little of it
            places = min(max(places, had_places + max(LEAST_ROOM, had_places // 8)), self.limit)
        places, groups = max(places, had_places), max(groups, had_groups)
        # zeros: what a mask hides must be finite
        grown = [self.keys.new_zeros(groups, slots, places, head_dim) for _ in range(2)]
        for new, old in zip(grown, (self.keys, self.values)):
            new[:had_groups, :, :had_places] = old
        self.keys, self.values = grown
        if self.held is not None:
            held = self.held.new_zeros(slots, places)
            held[:, :had_places] = self.held
            self.held = held


def rows_of(slots: list[int], device) -> slice | Tensor:
    """An index of these slots that is a view where they lie together."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)
