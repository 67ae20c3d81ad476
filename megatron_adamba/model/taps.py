"""States of the residual stream that a pass leaves behind to learn from; in a pipeline they travel to the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TapRequest:
    """What to keep of a pass: the same for every pass of a step, so that what travels keeps its shape."""

    layers: tuple[int, ...]
    """the residual behind so many blocks each"""
    positions: Tensor
    """[n] int64 places in each sequence (under sequence parallelism in this rank's part of it)"""
    first_tokens: int = 0
    """embeddings of so many positions from the first one on"""

    @property
    def size(self) -> int:
        """States of one sequence."""
        return len(self.layers) * len(self.positions) + self.first_tokens


class Taps:
    """The states of one pass, detached, in the order of the request; what has not been passed yet is zero.

    Between two stages they are further positions behind the sequence: one float tensor travels there, and backward
    leaves them alone.
    """

    def __init__(self, request: TapRequest) -> None:
        self.request = request
        self._states: dict[int, Tensor] = {}

    def behind(self, blocks: int, x: Tensor) -> None:
        """The stream behind so many blocks; 0 is the embedding. x: [batch, seq, hidden_size]."""
        if blocks in self.request.layers:
            self._states[blocks] = x.detach()[:, self.request.positions]
        if blocks == 0 and self.request.first_tokens:
            self._states[-1] = x.detach()[:, : self.request.first_tokens]

    def layer(self, blocks: int) -> Tensor:
        """[batch, n, hidden_size]."""
        return self._states[blocks]

    @property
    def first_tokens(self) -> Tensor:
        """[batch, first_tokens, hidden_size] embeddings."""
        return self._states[-1]

    def pack(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden_size] -> [batch, seq + request.size, hidden_size]."""
        parts = [self._states.get(key, x.new_zeros(x.shape[0], count, x.shape[2])) for key, count in self._slots()]
        return torch.cat([x, *parts], dim=1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The stream out of what `pack` made; the states are kept."""
        length = packed.shape[1] - self.request.size
        start = length
        for key, count in self._slots():
            self._states[key] = packed.detach()[:, start : start + count]
            start += count
        return packed[:, :length]

    def _slots(self) -> list[tuple[int, int]]:
        layers = [(layer, len(self.request.positions)) for layer in self.request.layers]
        return [*layers, (-1, self.request.first_tokens)] if self.request.first_tokens else layers
