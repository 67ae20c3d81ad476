"""What the tests of single operators share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest magnitude; where all is zero, exactly."""
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values in float64, each a leaf of its own."""
    return [tensor.detach().double().clone().requires_grad_() for tensor in tensors]


class NewTensors(TorchDispatchMode):
    """Records the largest tensor that comes into being; views of what was there do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
                self.shapes.append(tuple(tensor.shape))
        return result


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
