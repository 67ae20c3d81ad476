"""MXFP4 against the definition, value by value in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from surgery.gpt_oss_folders import mxfp4_blocks, mxfp4_values

from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery import mxfp4
from megatron_adamba.surgery.mxfp4 import dequantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_every_scale(dtype):
    """All 256 bytes; scales up to those whose values leave fp32."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for scale in range(253):
        got = dequantize(blocks, torch.full((16, 1), scale, dtype=torch.uint8), dtype)
        assert got.shape == (16, 32)
        values = got.flatten().tolist()
        for byte in range(256):
            for place, nibble in ((2 * byte, byte % 16), (2 * byte + 1, byte // 16)):
                want = math.ldexp(magnitudes[nibble % 8], scale - 127) * (-1 if nibble >= 8 else 1)
                assert values[place] == want and math.copysign(1, values[place]) == math.copysign(1, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_any_shape(dtype, monkeypatch):
    """Rows and blocks in odd numbers, and more rows than fit one chunk; bf16 rounds nothing."""
    monkeypatch.setattr(mxfp4, "_CHUNK_VALUES", 3 * 160)
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(0, 16, (7, 160), generator=generator)
    scales = torch.randint(0, 252, (7, 5), generator=generator)
    got = dequantize(mxfp4_blocks(nibbles), scales.to(torch.uint8), dtype)
    assert got.dtype == dtype and torch.equal(got.double(), mxfp4_values(nibbles, scales))


@pytest.mark.parametrize(("scale", "byte"), [(255, 0x00), (255, 0x22), (254, 0x04), (253, 0x70)])
def test_what_is_no_number_is_refused(scale, byte):
    """255 is not a number by the format; 4 * 2^127 and 6 * 2^126 are beyond fp32."""
    blocks, scales = torch.zeros(2, 3, 16, dtype=torch.uint8), torch.full((2, 3), 127, dtype=torch.uint8)
    blocks[1, 2, 5], scales[1, 2] = byte, scale
    with pytest.raises(CheckpointError, match=r"^layer\.scales: holds MXFP4 scales that are not numbers"):
        dequantize(blocks, scales, torch.bfloat16, "layer.scales")
