"""Rotary embedding as a rotation of complex numbers, with and without the norm behind it."""

from __future__ import annotations

import pytest
import torch
from op_helpers import leaves, near

from megatron_adamba.ops.rotary import rotary_table, rotate_and_norm


def turn(x, positions, theta, sign, norm_size, eps):
    """x: [batch, seq, heads, head_dim] in float64."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * sign * angle)[:, None]
    y = torch.cat([turned.real, turned.imag], dim=-1)
    return y / torch.sqrt(y.square().sum(-1, keepdim=True) / norm_size + eps) if norm_size else y


@pytest.mark.parametrize("share", [None, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(2, 9, 3, 10), (1, 1, 1, 2), (2, 3, 1, 6)])
def test_forward_and_gradient(shape, sign, share):
    """share: the divisor of the norm, by which heads that grew are larger than it."""
    norm_size = None if share is None else shape[-1] / share
    generator = torch.Generator().manual_seed(shape[-1])
    positions = torch.arange(5, 5 + shape[1])
    x = torch.randn(shape, generator=generator).requires_grad_()
    cotangent = torch.randn(shape, generator=generator)
    (x64,) = leaves(x)
    cos, sin = rotary_table(positions, shape[-1], 1e4, sign)
    got = rotate_and_norm(x, cos, sin, norm_size, 1e-2)
    want = turn(x64, positions, 1e4, sign, norm_size, 1e-2)
    near(got, want)
    got.backward(cotangent)
    want.backward(cotangent.double())
    near(x.grad, x64.grad)


def test_a_transposed_input_is_not_written_to():
    x = torch.randn(2, 3, 5, 4).transpose(1, 2)
    before = x.clone()
    cos, sin = rotary_table(torch.arange(5), 4, 100.0, 1)
    near(rotate_and_norm(x, cos, sin, 4, 0.0), turn(x.double(), torch.arange(5), 100.0, 1, 4, 0.0))
    assert torch.equal(x, before)


def test_zero_tokens():
    x = torch.zeros(0, 4, 2, 6, requires_grad=True)
    cos, sin = rotary_table(torch.arange(4), 6, 1e4, 1)
    rotate_and_norm(x, cos, sin, 6, 1e-5).sum().backward()
    assert x.grad.shape == x.shape


def test_the_table_is_float32_and_position_zero_turns_nothing():
    cos, sin = rotary_table(torch.arange(3), 8, 1e4, 1)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (3, 4)
    assert torch.equal(cos[0], torch.ones(4)) and not sin[0].any()
    back, forth = rotary_table(torch.arange(3), 8, 1e4, -1)
    assert torch.equal(back, cos) and torch.equal(forth, -sin)


def test_late_positions_keep_their_angle():
    positions = torch.tensor([100_000])
    cos, sin = rotary_table(positions, 16, 1e4, 1)
    angle = 1e5 * 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)
    # float32 carries an angle of 1e5 to 2^-8 at the fastest frequency
    assert (cos - angle.cos()).abs().max() < 0.01 and (sin - angle.sin()).abs().max() < 0.01


def test_scores_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for start in (0, 7):
        cos, sin = rotary_table(torch.tensor([start, start + 4]), 8, 1e4, -1)
        turned = rotate_and_norm(torch.cat([q, k], dim=1), cos, sin, None, 0.0)
        scores.append((turned[0, 0, 0] * turned[0, 1, 0]).sum())
    near(scores[0][None], scores[1][None])


def test_bfloat16():
    x = torch.randn(2, 5, 3, 8).bfloat16().requires_grad_()
    cos, sin = rotary_table(torch.arange(5), 8, 1e4, 1)
    y = rotate_and_norm(x, cos, sin, 8, 1e-5)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    near(y, turn(x.detach().double(), torch.arange(5), 1e4, 1, 8, 1e-5), 0.02)


def test_each_step_of_a_head_has_its_own_frequencies():
    positions = torch.arange(7)
    first, second, both = (rotary_table(positions, size, 1e4, -1) for size in (6, 4, [6, 10]))
    for one, two, table in zip(first, second, both):
        assert torch.equal(table, torch.cat([one, two], dim=-1))
