"""What a layer remembers of the tokens before, while text is generated."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer, [batch, capacity, kv_heads, head_dim]; the first `length` are filled."""

    def __init__(self, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device) -> None:
        self.keys = torch.empty(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [batch, new, kv_heads, head_dim] and return views of everything so far."""
        end = self.length + keys.shape[1]
        assert end <= self.keys.shape[1], "the cache is sized for the whole generation"
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end
        return self.keys[:, :end], self.values[:, :end]
