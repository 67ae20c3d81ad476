"""What kernels ask of whoever connects the ranks that share a layer; `parallel` provides it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """A tensor that is on its way."""

    def wait(self) -> Tensor: ...


class InputExchange(Protocol):
    """Around a linear map whose output rows are shared out over ranks: each reads the whole input, and each has a part
    of the input's gradient."""

    def gather(self, x: Tensor) -> Tensor:
        """The input as the map reads it, from what this rank holds."""

    def start_gather(self, x: Tensor) -> Pending:
        """The same, begun in the background."""

    def start_reduce(self, grad: Tensor) -> Pending:
        """Sum the input's gradient over the ranks; what belongs to this rank's input. `grad` may be used up."""


class VocabularyExchange(InputExchange, Protocol):
    """For a head whose vocabulary is shared out."""

    def gather_parts(self, part: Tensor) -> Tensor:
        """[...] from every rank, [ranks, ...]. No gradient."""
