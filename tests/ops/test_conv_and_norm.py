"""The causal convolution and the gated norms against plain formulas under autograd."""

import pytest
import torch
import torch.nn.functional as F

from megatron_adamba.ops.causal_conv import causal_conv1d, causal_conv1d_step
from megatron_adamba.ops.gated_norm import gated_rms_norm, silu_gate


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert b.numel() == 0 or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)


def plain_conv(x, weight, bias, state, seq_idx):
    """Every window by itself; what lies before the sequence is of its first document."""
    width = weight.shape[1]
    padded = torch.cat([state.transpose(1, 2), x], dim=1)
    idx = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=1)
    total = bias.expand_as(x)
    for k in range(width):
        same = idx[:, k : k + x.shape[1]] == seq_idx
        total = total + padded[:, k : k + x.shape[1]] * weight[:, k] * same.unsqueeze(-1)
    last = padded[:, x.shape[1] :] * (idx[:, x.shape[1] :] == idx[:, -1:]).unsqueeze(-1)
    return F.silu(total), last.transpose(1, 2)


@pytest.mark.oracle
@pytest.mark.parametrize("channels, seq", [(6, 1), (6, 2), (6, 9), (3000, 150)])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_conv_and_every_gradient(channels, seq, width, packed):
    torch.manual_seed(0)
    x, state = double(2, seq, channels), double(2, channels, width - 1)
    weight, bias = double(channels, width), double(channels)
    idx = torch.zeros(2, seq, dtype=torch.int32)
    if packed:
        idx[:, seq // 2 :] += 1
        idx[1, seq // 2 + 2 :] += 3
    leaves = [x, weight, bias, state]
    want = plain_conv(*leaves, idx)
    got = causal_conv1d(x, weight, bias, idx if packed else None, state, return_final_state=True)
    seeds = [torch.randn_like(t) for t in want]
    assert_same(got, want)
    assert_same(torch.autograd.grad(got, leaves, seeds), torch.autograd.grad(want, leaves, seeds))


@pytest.mark.oracle
def test_conv_is_torchs_convolution():
    x, weight, bias = double(2, 20, 6), double(6, 4), double(6)
    want = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=6)[..., :20].transpose(1, 2)
    assert_same([causal_conv1d(x, weight, bias, silu=False)], [want])
    assert_same([causal_conv1d(x, weight, None, silu=False)], [want - bias])


def test_conv_steps_follow_the_whole():
    x, weight, bias = double(2, 7, 6), double(6, 4), double(6)
    state = torch.zeros(2, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        y, final = causal_conv1d(x, weight, bias, return_final_state=True)
        steps = [causal_conv1d_step(x[:, t], state, weight, bias) for t in range(7)]
    assert_same([torch.stack(steps, dim=1), state], [y, final])


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6)])
def test_no_tokens_give_zero_gradients(shape):
    x, weight, bias = double(*shape), double(6, 4), double(6)
    causal_conv1d(x, weight, bias).sum().backward()
    z, scale = double(*shape), double(6)
    gated_rms_norm(x, z, scale, 3, 1e-5).sum().backward()
    assert all(not t.grad.any() for t in (weight, bias, scale))


@pytest.mark.oracle
@pytest.mark.parametrize("group_size", [8, 24])
def test_gated_norm_and_every_gradient(group_size):
    torch.manual_seed(0)
    x, z, weight = double(2, 30, 24), double(2, 30, 24), double(24)
    gated = (x * F.silu(z)).unflatten(-1, (-1, group_size))
    want = F.rms_norm(gated, (group_size,), eps=1e-5).flatten(-2) * weight
    got = gated_rms_norm(x, z, weight, group_size, 1e-5)
    seed = torch.randn_like(want)
    assert_same([got], [want])
    leaves = [x, z, weight]
    assert_same(torch.autograd.grad(got, leaves, seed), torch.autograd.grad(want, leaves, seed))


@pytest.mark.oracle
def test_silu_gate_and_its_gradients():
    x, z = double(2, 30, 24), double(2, 30, 24)
    got, want = silu_gate(x, z), x * F.silu(z)
    assert_same([got], [want])
    seed = torch.randn_like(want)
    assert_same(torch.autograd.grad(got, [x, z], seed), torch.autograd.grad(want, [x, z], seed))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 4, 6)
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="initial_state must be"):
        causal_conv1d(x, torch.zeros(6, 4), initial_state=torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match="group_size must divide"):
        gated_rms_norm(x, x, torch.zeros(6), 4, 1e-5)
    with pytest.raises(ValueError, match="one shape"):
        silu_gate(x, x[:, :2])
