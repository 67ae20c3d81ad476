"""MXFP4: 32 values of 4 bits that share a power of two (OCP Microscaling Formats 1.0, section 5.3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_adamba.errors import CheckpointError

BLOCK_VALUES = 32
"""values of one shared scale, along the input dimension"""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS, _SCALE_NAN = 127, 255
_SAFE_SCALE = 252
"""6 * 2^125; above it values may leave the range of fp32 and bf16"""
_CHUNK_VALUES = 1 << 22
"""values whose indices are in memory at one time"""
_PAIR_BITS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype, name: str = "") -> Tensor:
    """[rows, n, 16] and [rows, n], both uint8, as [rows, 32 n] in `dtype`: bf16 or fp32, which hold each value exactly.

    Of a byte the low nibble is the value at the even place. Raises CheckpointError naming `name` where a scale is
    not a number, or a value is beyond the range of the dtype.
    """
    rows, groups, _ = blocks.shape
    pairs, powers = _pair_table(dtype), _power_table(dtype)
    out = torch.empty(rows, groups, BLOCK_VALUES, dtype=dtype)
    step = max(1, _CHUNK_VALUES // max(1, groups * BLOCK_VALUES))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = pairs.index_select(0, blocks[part].flatten().int()).view(dtype).view(-1, groups, BLOCK_VALUES)
        torch.mul(values, powers[scales[part].int()].unsqueeze(-1), out=out[part])
    if scales.numel() and int(scales.max()) > _SAFE_SCALE and not torch.isfinite(out).all():
        raise CheckpointError(f"{name}: holds MXFP4 scales that are not numbers; the file is damaged")
    return out.flatten(1)


def _pair_table(dtype: torch.dtype) -> Tensor:
    """Byte -> the bits of its two values, the low nibble's first: one look-up finds both."""
    nibbles = [*_MAGNITUDES, *(-value for value in _MAGNITUDES)]
    pairs = torch.tensor([[nibbles[byte & 15], nibbles[byte >> 4]] for byte in range(256)], dtype=dtype)
    return pairs.view(_PAIR_BITS[dtype]).flatten()


def _power_table(dtype: torch.dtype) -> Tensor:
    """Scale -> 2^(scale - 127); 255 is not a number."""
    powers = [math.ldexp(1.0, scale - _SCALE_BIAS) for scale in range(_SCALE_NAN)]
    return torch.tensor([*powers, math.nan], dtype=dtype)
