"""RMSNorm with a divisor of its own against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from op_helpers import leaves, near

from megatron_adamba.ops.rms_norm import inverse_rms, rms_norm


def formula(x, scale, norm_size, eps):
    y = x / torch.sqrt((x * x).sum(-1, keepdim=True) / norm_size + eps)
    return y if scale is None else y * scale


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("norm_size", [1, 7, 40])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 7), (2, 1), (4, 129), (2, 3, 2, 5)])
def test_forward_and_gradients(shape, norm_size, has_scale):
    generator = torch.Generator().manual_seed(norm_size)
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    scale = torch.randn(shape[-1], generator=generator).requires_grad_() if has_scale else None
    cotangent = torch.randn(shape, generator=generator)
    x64, *rest = leaves(x, *([scale] if has_scale else []))
    got = rms_norm(x, scale, norm_size, 0.5)
    want = formula(x64, rest[0] if rest else None, norm_size, 0.5)
    near(got, want)
    got.backward(cotangent)
    want.backward(cotangent.double())
    near(x.grad, x64.grad)
    if has_scale:
        near(scale.grad, rest[0].grad)


@pytest.mark.parametrize("eps", [1e-12, 1.0])
def test_gradcheck(eps):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 3, eps), (x, scale))


def test_zero_rows():
    x = torch.zeros(0, 4, 6, requires_grad=True)
    scale = torch.randn(6, requires_grad=True)
    rms_norm(x, scale, 6, 1e-5).sum().backward()
    assert x.grad.shape == x.shape and scale.grad.shape == (6,) and not scale.grad.any()


def test_a_row_of_zeros_stays_finite():
    x = torch.zeros(2, 6, requires_grad=True)
    y = rms_norm(x, None, 6, 1e-5)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()
    near(x.grad, torch.full((2, 6), 1e-5**-0.5))


def test_a_frozen_scale_has_no_gradient():
    x, scale = torch.randn(2, 6, requires_grad=True), torch.randn(6)
    rms_norm(x, scale, 6, 1e-5).sum().backward()
    assert scale.grad is None and x.grad.any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_input_is_normed_in_float32(scale_dtype):
    """One rounding at the end: half a unit in the last place of bfloat16, 2^-9, of each value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 257, generator=generator).bfloat16().requires_grad_()
    scale = torch.randn(257, generator=generator).to(scale_dtype).requires_grad_()
    got = rms_norm(x, scale, 100, 1e-5)
    want = formula(x.double(), scale.double(), 100, 1e-5)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2**-8 * want.abs()).all()
    got.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and scale.grad.dtype == scale_dtype


def test_the_usual_norm_is_the_librarys():
    x, scale = torch.randn(3, 10), torch.randn(10)
    near(rms_norm(x, scale, 10, 1e-5), torch.nn.functional.rms_norm(x, (10,), scale, 1e-5))
    near(inverse_rms(x, 4, 0.5), 1 / torch.sqrt(x.square().sum(-1, keepdim=True) / 4 + 0.5))
