"""States of the residual stream that a pass leaves behind to learn from; in a pipeline they travel to the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.ops.linear_cross_entropy import IGNORED
from megatron_adamba.parallel.tensor import TensorParallel

HeadLosses = Callable[[Tensor, Tensor], Tensor]
"""(residual in the stream's form, labels [batch, seq]) to each position's loss [batch, seq], without gradient"""
HeadDivergences = Callable[[Tensor], Tensor]
"""residuals [states, tokens, hidden_size] to how far each but the last predicts from the last, [states - 1, tokens]"""
_DOCUMENTS = -1
"""key of the mean embeddings among the states"""


@dataclass(frozen=True)
class TapRequest:
    """What to keep of a pass: as much of every pass of a step, so that what travels keeps its shape."""

    layers: tuple[int, ...]
    """the residual behind so many blocks each"""
    positions: Tensor
    """[n] int64 places in every sequence"""
    documents: Tensor | None = None
    """[batch, documents, 2] int64: first place and number of tokens, 0 for none, whose mean embedding is kept"""
    compared_with: int | None = None
    """blocks of the whole model: what leaving changes is then the divergence from the predictions behind the last one,
    and not the loss on the token that came"""

    @property
    def size(self) -> int:
        """States of one sequence."""
        documents = 0 if self.documents is None else self.documents.shape[1]
        return len(self.layers) * len(self.positions) + documents


class Taps:
    """The states of one pass, detached, in the order of the request; what has not been passed yet is zero.

    Between two stages they are further positions behind the sequence: one float tensor travels there, and backward
    leaves them alone. Under sequence parallelism a rank keeps what lies in its part of the sequence, and zeros, until
    `finish` sums them.
    """

    def __init__(self, request: TapRequest) -> None:
        self.request = request
        self._states: dict[int, Tensor] = {}
        self.exit_losses = torch.zeros(0)
        """[batch, layers, n] nats of a pass that leaves there, 0 where unscored; on the ranks with the head"""
        self.divergences = torch.zeros(0)
        """[batch, layers, n] nats from the predictions at the end to those there; in place of `exit_losses` where the
        request compares"""
        self.token_losses = torch.zeros(0)
        """[batch, seq] nats of the pass, 0 where unscored; filled while its mean loss is taken"""
        self.scored = torch.zeros(0, dtype=torch.bool)
        """[batch, seq]: whether a position has a label"""

    def behind(self, blocks: int, x: Tensor, tp: TensorParallel) -> None:
        """The stream behind so many blocks; 0 is the embedding. x: [batch, seq, hidden_size] in the stream's form."""
        if blocks in self.request.layers or blocks == self.request.compared_with:
            self._states[blocks] = self._at_positions(x.detach(), tp)
        if blocks == 0 and self.request.documents is not None:
            self._states[_DOCUMENTS] = self._mean_embeddings(x.detach(), tp)

    def _at_positions(self, x: Tensor, tp: TensorParallel) -> Tensor:
        positions = self.request.positions
        if not tp.sequence_parallel:
            return x[:, positions]
        place = positions - tp.rank * x.shape[1]
        here = (place >= 0) & (place < x.shape[1])
        return x[:, place.clamp(0, x.shape[1] - 1)] * here[:, None]

    def _mean_embeddings(self, x: Tensor, tp: TensorParallel) -> Tensor:
        """Sums over a document's first tokens as one matmul, [documents, seq] times [seq, hidden_size]."""
        assert self.request.documents is not None
        first, count = self.request.documents.unsqueeze(-1).unbind(2)
        start = tp.rank * x.shape[1] if tp.sequence_parallel else 0
        place = torch.arange(start, start + x.shape[1], device=x.device)
        inside = (place >= first) & (place < first + count)
        return (inside / count.clamp(min=1)).to(x.dtype) @ x

    def layer(self, blocks: int) -> Tensor:
        """[batch, n, hidden_size]."""
        return self._states[blocks]

    @property
    def mean_embeddings(self) -> Tensor:
        """[batch, documents, hidden_size]."""
        return self._states[_DOCUMENTS]

    def finish(self, head: HeadLosses, divergences: HeadDivergences, labels: Tensor, tp: TensorParallel) -> None:
        """On the ranks with the head, behind a pass to the last block: what leaving at each state comes to."""
        self.scored = labels != IGNORED
        if tp.sequence_parallel:
            together = torch.cat(list(self._states.values()), dim=1)
            dist.all_reduce(together, group=tp.group)
            parts = together.split([state.shape[1] for state in self._states.values()], dim=1)
            self._states = dict(zip(self._states, parts))
        layers, positions = self.request.layers, self.request.positions
        if not layers:
            return
        if self.request.compared_with is not None:
            kept = torch.stack([self._states[layer] for layer in (*layers, self.request.compared_with)])
            found = divergences(kept.flatten(1, 2))
            self.divergences = found.unflatten(1, (-1, len(positions))).transpose(0, 1)
            return
        states = torch.cat([self._states[layer] for layer in layers], dim=1)
        wanted = labels[:, positions].repeat(1, len(layers))
        if tp.sequence_parallel:
            # the head takes each rank's part of a sequence: these states are one that the ranks share out
            states = F.pad(states, (0, 0, 0, -states.shape[1] % tp.size)).chunk(tp.size, dim=1)[tp.rank]
        losses = head(states, tp.pad_sequence(wanted, IGNORED))[:, : wanted.shape[1]]
        self.exit_losses = losses.unflatten(1, (len(layers), len(positions)))

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
        documents = self.request.documents
        return layers if documents is None else [*layers, (_DOCUMENTS, documents.shape[1])]
