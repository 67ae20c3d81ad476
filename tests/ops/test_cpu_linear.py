"""The linear layer beside torch's own, above and below the size where oneDNN takes over."""

import pytest
import torch
import torch.nn.functional as F

from megatron_adamba.ops import cpu_linear


@pytest.mark.oracle
@pytest.mark.parametrize("in_features, out_features", [(300, 500), (500, 300), (3, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_are_torchs(in_features, out_features, with_bias):
    torch.manual_seed(0)
    wide = torch.randn(2, 100, in_features + 4, requires_grad=True)
    weight = torch.randn(out_features, in_features, requires_grad=True)
    bias = torch.randn(out_features, requires_grad=True) if with_bias else None
    leaves = [t for t in (wide, weight, bias) if t is not None]
    results = []
    for function in (cpu_linear.linear, F.linear):
        y = function(wide[..., 4:], weight, bias)  # not contiguous
        results.append([y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert got.is_contiguous()


def test_frozen_weights_get_no_gradient():
    x = torch.randn(200, 300, requires_grad=True)
    weight = torch.randn(500, 300)
    cpu_linear.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_the_operator_is_found_here_and_used_only_where_it_serves():
    assert cpu_linear._onednn_linear() is not None
    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    assert cpu_linear._served(x, weight)
    others = [(x.double(), weight.double()), (x.bfloat16(), weight.bfloat16()), (x[:0], weight), (x, weight.t())]
    assert not any(cpu_linear._served(*pair) for pair in others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_linear.linear(x, weight).dtype == torch.bfloat16
