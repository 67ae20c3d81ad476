"""Bytes that tensor and sequence parallelism move in one micro-batch: a formula of the config and the plan.

Written down in `micro_batch_traffic`; what a run really issues is what a test holds it against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_adamba.blueprint.manifest import mamba1_dt_rank
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.config.resolved import ResolvedModel


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank hands to collectives, by kind; the same on every rank of a tp group.

    Handed in are the whole tensor for a sum, whether all of it comes back (`all_reduce`) or a rank's part
    (`reduce_scatter`), and a rank's own part for `all_gather`. On a ring of p ranks a rank then sends 2 (p - 1) / p,
    (p - 1) / p and p - 1 times these.
    """

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.all_reduce + other.all_reduce,
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
        )


NOTHING = Traffic()


def micro_batch_traffic(
    config: ResolvedModel,
    widths: Sequence[int],
    exit_layer: int,
    batch: int,
    seq: int,
    *,
    tp: int,
    sp: bool,
    element_bytes: int,
    recompute: bool = False,
) -> Traffic:
    """Of forward and backward of the mean loss over [batch, seq] tokens, everything trainable; nothing where tp is 1.

    Of models without E blocks, whose traffic depends on the router.

    widths, exit_layer: the plan's; element_bytes: of weights and activations; recompute: activation checkpointing of
    the blocks. Blocks above the exit, which run on zero tokens or not at all, send nothing.

    With s = element_bytes, f = max(s, 4) for what is kept in fp32 or better, S = seq, under sp rounded up to a multiple
    of tp, and A(c) = batch * S * c * s, the residual stream's c channels:

    | part                         | forward                        | backward                                   |
    | ---------------------------- | ------------------------------ | ------------------------------------------ |
    | without sp                   |                                |                                            |
    | attention or MLP at width w  | all_reduce A(w)                | all_reduce A(w)                            |
    | Mamba                        | all_reduce A(H)                | all_reduce A(H)                            |
    | embedding                    | all_reduce A(H)                |                                            |
    | head                         | all_gather 3 batch S f         | all_reduce A(H)                            |
    | with sp                      |                                |                                            |
    | attention or MLP at width w  | all_gather A(w) / tp,          | 2 all_gather A(w) / tp, reduce_scatter A(w)|
    |                              | reduce_scatter A(w)            |                                            |
    | Mamba                        | the same with w = H            | the same with w = H                        |
    | every norm of c channels     |                                | all_reduce c f (f without norm weights)    |
    | embedding                    | reduce_scatter A(H)            | all_gather A(H) / tp                       |
    | head                         | all_gather A(H) / tp           | reduce_scatter A(H)                        |
    |                              | + 3 batch S f                  |                                            |
    | either way                   |                                |                                            |
    | inside Mamba-1               | all_reduce A(dt_rank + 2 N)    | all_reduce A(dt_rank + 2 N)                |

    A layer's input is gathered, or there as a whole; its output is a sum over the ranks; backward is the mirror image,
    where the input's gradient is a sum. Under sp a layer keeps its own part of the input alone, so backward gathers the
    input once more for the weights' gradients, and the gradient of the output. A norm sees a rank's own tokens, so the
    gradient of its scale (gain times weights, c numbers; the gain alone where there are no weights) is a sum. The
    head's three numbers a token are the largest logit, the sum of exponentials and the label's logit. Mamba-1 sums what
    its dt, B and C (of N states) are made from.

    Recomputation repeats the forward of every block that runs but for its last sum, which nothing that backward needs
    comes after.
    """
    if tp == 1:
        return NOTHING
    assert "E" not in config.block_pattern, "what experts send depends on the router"
    hidden = config.hidden_size
    tokens = batch * (-(-seq // tp) * tp if sp else seq)
    rows = block_rows(config)
    ranks = _Ranks(tokens, tp, sp, element_bytes, config.norm_weight)
    total = ranks.leave(hidden) + ranks.leave_backward(hidden)
    for index, width in enumerate(widths):
        parts = list(_parts(config, config.block_pattern[index], rows[index][width].width))
        if index < exit_layer:
            total += _block(ranks, parts, recompute)
            for channels, _ in parts:
                total += ranks.norm_backward(channels)
    return total + ranks.norm_backward(hidden) + ranks.head(hidden)


def _parts(config: ResolvedModel, letter: str, width: int) -> Iterator[tuple[int, int]]:
    """(channels that it reads and writes, channels that are summed up inside) of each sub-layer of a block."""
    if letter == "T":
        yield width, 0
    else:
        inside = mamba1_dt_rank(config) + 2 * config.mamba_d_state if config.mamba_version == 1 else 0
        yield config.hidden_size, inside
    if letter == "T" or config.mamba_use_mlp:
        yield width, 0


def _block(ranks: _Ranks, parts: list[tuple[int, int]], recompute: bool) -> Traffic:
    """Forward and backward of a block on real tokens, its norms left out."""
    total = NOTHING
    for number, (channels, inside) in enumerate(parts, 1):
        shared = ranks.summed(inside)
        entered = ranks.enter(channels) + shared
        total += entered + ranks.leave(channels)
        total += ranks.leave_backward(channels) + shared + ranks.enter_backward(channels)
        if recompute:
            total += entered if number == len(parts) else entered + ranks.leave(channels)
    return total


@dataclass(frozen=True)
class _Ranks:
    """What the steps of `TensorParallel` hand to collectives, for so many channels."""

    tokens: int
    """of the whole micro-batch, those that pad it among them"""
    tp: int
    sp: bool
    element_bytes: int
    norm_weight: bool

    @property
    def exact_bytes(self) -> int:
        """Of a number in fp32 or better."""
        return max(self.element_bytes, 4)

    def _stream(self, channels: int) -> int:
        return self.tokens * channels * self.element_bytes

    def gathered(self, channels: int) -> Traffic:
        """Each rank's part of the sequence, to all."""
        return Traffic(all_gather=self._stream(channels) // self.tp)

    def summed(self, channels: int) -> Traffic:
        return Traffic(all_reduce=self._stream(channels))

    def enter(self, channels: int) -> Traffic:
        return self.gathered(channels) if self.sp else NOTHING

    def leave(self, channels: int) -> Traffic:
        return Traffic(reduce_scatter=self._stream(channels)) if self.sp else self.summed(channels)

    def enter_backward(self, channels: int) -> Traffic:
        return self.enter(channels) + self.leave(channels)

    def leave_backward(self, channels: int) -> Traffic:
        return self.enter(channels)

    def norm_backward(self, channels: int) -> Traffic:
        if not self.sp or not self.tokens:
            return NOTHING
        return Traffic(all_reduce=(channels if self.norm_weight else 1) * self.exact_bytes)

    def head(self, channels: int) -> Traffic:
        statistics = Traffic(all_gather=3 * self.tokens * self.exact_bytes)
        return self.enter(channels) + statistics + self.leave(channels)
