"""Experts on their own tokens against one product after the other in float64, and the permutation around them."""

from __future__ import annotations

import pytest
import torch
from cuda_marks import needs_cuda

from megatron_adamba.ops.activation import clamped_swiglu
from megatron_adamba.ops.expert_call import ExpertCall
from megatron_adamba.ops.expert_mlp import expert_mlp
from megatron_adamba.ops.grouped_experts import GroupedExperts, grouped_served
from megatron_adamba.ops.nested_linear import Accumulation, GradientSink
from megatron_adamba.ops.permute import Dispatch

EXPERTS, ROWS, COLS, LIMIT, SLOPE = 5, 16, 12, 1.5, 1.702
SHAPES = ((ROWS, COLS), (ROWS, COLS), (COLS, ROWS), (ROWS,), (ROWS,), (COLS,))


def parameters(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(EXPERTS, *shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def by_hand(x, weights, params, counts, rows, limit=LIMIT):
    gate, up, down, gate_bias, up_bias, down_bias = params
    cols, parts, start = x.shape[1], [], 0
    for e, count in enumerate(counts):
        own = x[start : start + count]
        g = own @ gate[e, :rows, :cols].t() + gate_bias[e, :rows]
        u = own @ up[e, :rows, :cols].t() + up_bias[e, :rows]
        y = clamped_swiglu(g, u, limit, SLOPE) @ down[e, :cols, :rows].t() + down_bias[e, :cols]
        parts.append(y * weights[start : start + count, None])
        start += count
    return torch.cat(parts)


def data(counts, cols, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(counts), cols, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).to(dtype).requires_grad_()
    return x, weights


def run(x, weights, params, counts, rows, mode=Accumulation.DIRECT, sinks=None, limit=LIMIT):
    sinks = sinks or [GradientSink() for _ in params]
    counts = torch.tensor(counts, device=x.device)
    return expert_mlp(x, weights, params, counts, rows, limit, SLOPE, sinks, mode)


def run_grouped(x, weights, params, counts, rows, mode=Accumulation.DIRECT, sinks=None, limit=LIMIT):
    """By the kernels that serve CUDA devices, which PyTorch also has for a CPU."""
    sinks = tuple(sinks or [GradientSink() for _ in params])
    trained = tuple(p.requires_grad for p in params)
    given = [p.detach() for p in params] if mode is Accumulation.DEFER else params
    call = ExpertCall(torch.tensor(counts), rows, x.shape[1], limit, SLOPE, mode, sinks, trained)
    return GroupedExperts.apply(x, weights, None, call, *given)


WAYS = pytest.mark.parametrize("run", [run, run_grouped], ids=["loop", "grouped"])


def near(got, want):
    assert (got - want).abs().max() <= 1e-5 * max(want.abs().max().item(), 1)


@WAYS
@pytest.mark.parametrize("counts", [(3, 0, 5, 1, 2), (0, 0, 0, 0, 7), (11, 0, 0, 0, 0)])
@pytest.mark.parametrize(("rows", "cols"), [(16, 12), (4, 4), (16, 8), (4, 12)])
def test_output_and_gradients(run, counts, rows, cols):
    ours, exact = parameters(), [p.detach().double().requires_grad_() for p in parameters()]
    x, weights = data(counts, cols)
    x64, weights64 = (t.detach().double().requires_grad_() for t in (x, weights))
    out, want = run(x, weights, ours, counts, rows), by_hand(x64, weights64, exact, counts, rows)
    near(out, want)
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * factor).sum().backward()
    (want * factor).sum().backward()
    for mine, theirs in zip([x, weights, *ours], [x64, weights64, *exact]):
        near(mine.grad, theirs.grad)
    for parameter, shape in zip(ours, SHAPES):
        outside = torch.ones_like(parameter, dtype=torch.bool)
        used = [rows if size == ROWS else cols for size in shape]
        outside[(slice(None), *(slice(0, n) for n in used))] = False
        assert not parameter.grad[outside].any(), "exactly zero outside the slice"


def test_odd_sizes():
    """The loop has no alignment to keep."""
    ours, exact = parameters(), [p.detach().double() for p in parameters()]
    x, weights = data((3, 0, 5, 1, 2), 5)
    near(run(x, weights, ours, (3, 0, 5, 1, 2), 7), by_hand(x.double(), weights.double(), exact, (3, 0, 5, 1, 2), 7))


def test_clamping_holds_back_gradients():
    """With a limit that most pre-activations pass, the gradient is still that of the formula."""
    x, weights = data((4, 4, 4, 4, 4), COLS, torch.float64)
    params = parameters(torch.float64)
    clamped = lambda *values: run(values[0], values[1], values[2:], (4,) * 5, ROWS)
    assert torch.autograd.gradcheck(clamped, (x, weights, *params))


def test_no_tokens_at_all_give_zero_gradients():
    params = parameters()
    x, weights = data((0,) * 5, COLS)
    run(x, weights, params, (0,) * 5, ROWS).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in params)


@WAYS
def test_sums_over_micro_batches_are_handed_over_once(run):
    """An expert that is idle in the last micro-batch keeps what it got before."""
    batches = [((3, 2, 0, 1, 0), 4, 4), ((0, 5, 1, 0, 0), 16, 12), ((0, 0, 4, 0, 0), 4, 12)]
    params, exact = parameters(), parameters()
    sinks = [GradientSink() for _ in params]
    for number, (counts, rows, cols) in enumerate(batches):
        mode = Accumulation.HAND_OVER if number == 2 else Accumulation.DEFER
        run(*data(counts, cols), params, counts, rows, mode, sinks).sum().backward()
        assert all((p.grad is None) == (number < 2) for p in params)
        by_hand(*data(counts, cols), exact, counts, rows).sum().backward()
    for mine, theirs in zip(params, exact):
        near(mine.grad, theirs.grad)


@pytest.mark.parametrize("k", [1, 3])
def test_the_permutation_loses_nothing(k):
    generator = torch.Generator().manual_seed(5)
    choices = torch.stack([torch.randperm(6, generator=generator)[:k] for _ in range(17)])
    dispatch = Dispatch(choices, 6)
    x = torch.randn(17, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = dispatch.spread(x)
    assert dispatch.counts.tolist() == torch.bincount(choices.flatten(), minlength=6).tolist()
    assert torch.equal(dispatch.sort(choices), choices.flatten().sort(stable=True).values)
    assert torch.allclose(dispatch.collect(rows), k * x)
    assert torch.autograd.gradcheck(lambda t: dispatch.collect(dispatch.spread(t).square()), (x,))


def test_the_permutation_of_no_tokens():
    dispatch = Dispatch(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert dispatch.counts.tolist() == [0, 0, 0] and dispatch.collect(dispatch.spread(torch.zeros(0, 4))).shape == (
        0,
        4,
    )


@WAYS
@pytest.mark.parametrize("frozen", [(0, 1, 2, 3, 4, 5), (0, 4)])
def test_frozen_experts_pass_the_gradient_on(run, frozen):
    params, exact = parameters(), [p.detach().double() for p in parameters()]
    for which in frozen:
        params[which].requires_grad_(False)
    (x, weights), counts = data((3, 0, 5, 1, 2), COLS), (3, 0, 5, 1, 2)
    x64 = x.detach().double().requires_grad_()
    run(x, weights, params, counts, ROWS).square().sum().backward()
    by_hand(x64, weights.detach().double(), exact, counts, ROWS).square().sum().backward()
    near(x.grad, x64.grad)
    assert [p.grad is None for p in params] == [which in frozen for which in range(len(params))]


def rounded(device="cpu"):
    """Parameters of sizes that the grouped kernels take, in bf16, and the same values in float64."""
    shapes = ((16, 24), (16, 24), (24, 16), (16,), (16,), (24,))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(EXPERTS, *shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    return (
        [value.detach().to(kind, copy=True).requires_grad_() for value in values]
        for kind in (torch.bfloat16, torch.float64)
    )


def compare_rounded(run, counts, rows, cols, params, exact, device="cpu"):
    """Within 1% of float64, in norm: autograd over the formula in bf16 comes to 0.1 to 1.1% here.

    Without a limit: a pre-activation that rounding carries across it has another gradient, on either side.
    """
    x, weights = (t.detach().to(device) for t in data(counts, cols, torch.bfloat16))
    want = by_hand(x.double(), weights.double(), exact, counts, rows, limit=0.0)
    out = run(x, weights, params, counts, rows, limit=0.0)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    want.sum().backward()
    for mine, true in [(out, want), *((p.grad, e.grad) for p, e in zip(params, exact))]:
        assert (mine.double() - true).norm() <= 0.01 * true.norm()


@WAYS
@pytest.mark.parametrize(("rows", "cols"), [(16, 24), (8, 24), (16, 8)])
def test_bf16_stays_near(run, rows, cols):
    compare_rounded(run, (8, 0, 16, 3, 5), rows, cols, *rounded())


@needs_cuda
@pytest.mark.parametrize("mode", [Accumulation.DIRECT, Accumulation.HAND_OVER])
@pytest.mark.parametrize(("rows", "cols"), [(16, 24), (8, 24), (16, 8)])
def test_grouped_kernels_on_a_gpu(mode, rows, cols):
    """Those of the device, through `expert_mlp` itself, sliced and whole; nothing waits for the device."""

    def run_quietly(x, weights, params, counts, rows, limit):
        assert grouped_served(x, params, rows)
        on_device, sinks = torch.tensor(counts, device="cuda"), [GradientSink() for _ in params]
        torch.cuda.set_sync_debug_mode("error")
        try:
            return expert_mlp(x, weights, params, on_device, rows, limit, SLOPE, sinks, mode)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    compare_rounded(run_quietly, (3, 0, 5, 1, 2), rows, cols, *rounded("cuda"), "cuda")
