"""Mamba-2's chunked scan against its recurrence, written out step by step in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adamba.ops.ssd import ssd_scan, ssd_step
from megatron_adamba.ops.ssd_decay import Decays


def recurrence(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx):
    batch, seq, nheads, _ = x.shape
    per_group = nheads // B.shape[2]
    B, C = B.repeat_interleave(per_group, dim=2), C.repeat_interleave(per_group, dim=2)
    dt = F.softplus(dt + dt_bias)
    state, outputs = initial_states, []
    for t in range(seq):
        if t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(batch, 1, 1, 1)
        new = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + new
        outputs.append((state * C[:, t, :, None, :]).sum(-1) + D.view(nheads, -1) * x[:, t])
    return torch.stack(outputs, dim=1), state


def make_inputs(batch, seq, nheads, head_dim, ngroups, d_state, decay=1.0, wide_D=False):
    gen = torch.Generator().manual_seed(seq)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return {
        "x": rand(batch, seq, nheads, head_dim),
        "dt": rand(batch, seq, nheads),
        "A": -decay * rand(nheads).exp(),
        "B": rand(batch, seq, ngroups, d_state),
        "C": rand(batch, seq, ngroups, d_state),
        "D": rand(nheads, head_dim) if wide_D else rand(nheads),
        "dt_bias": rand(nheads),
        "initial_states": rand(batch, nheads, head_dim, d_state),
    }


def grads(function, inputs, dtype, d_y, d_final):
    leaves = {k: v.detach().clone().to(dtype).requires_grad_() for k, v in inputs.items()}
    y, final = function(**leaves)
    torch.autograd.backward([y, final], [d_y.to(y.dtype), d_final.to(final.dtype)])
    return {"y": y.detach(), "final": final.detach(), **{k: v.grad for k, v in leaves.items()}}


def assert_near(got, want, tolerance):
    for name, expected in want.items():
        error = (got[name].double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e} of its largest magnitude"


def documents(batch, seq, starts):
    idx = torch.zeros(batch, seq, dtype=torch.int32)
    for start in starts:
        idx[:, start:] += 1
    if batch > 1:
        idx[1] += torch.arange(seq) // 11 + 3  # rows need not agree, nor count from 0
    return idx


CASES = {
    # batch, seq, nheads, head_dim, ngroups, d_state, chunk_size, document starts, decay
    "ragged": (2, 37, 4, 8, 1, 16, 16, [], 1.0),
    "groups": (2, 45, 6, 4, 3, 8, 16, [20], 1.0),
    "boundary inside and at a chunk's edge": (2, 70, 4, 4, 2, 8, 16, [5, 32, 40, 41], 1.0),
    "shorter than a chunk": (1, 5, 2, 4, 1, 8, 64, [], 1.0),
    "one token": (1, 1, 2, 4, 1, 4, 16, [], 1.0),
    "strong decay": (1, 64, 4, 4, 1, 8, 32, [], 20.0),
    "strong and weak decays mixed": (1, 128, 4, 8, 1, 16, 64, [], 8.0),
    "many documents in a chunk": (1, 50, 2, 4, 1, 4, 64, range(3, 50, 3), 1.0),
}


@pytest.mark.oracle
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case, dtype, tolerance):
    *sizes, chunk_size, starts, decay = CASES[case]
    inputs = make_inputs(*sizes, decay=decay, wide_D=case == "groups")
    idx = documents(sizes[0], sizes[1], starts)
    d_y, d_final = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_states"])
    want = grads(lambda **kw: recurrence(**kw, seq_idx=idx), inputs, torch.float64, d_y, d_final)

    def ours(**kw):
        return ssd_scan(**kw, chunk_size=chunk_size, seq_idx=idx, return_final_states=True)

    assert_near(grads(ours, inputs, dtype, d_y, d_final), want, tolerance)


def test_decay_underflow_gives_no_nan():
    inputs = make_inputs(1, 40, 2, 4, 1, 4, decay=1e5)
    got = grads(
        lambda **kw: ssd_scan(**kw, chunk_size=16, return_final_states=True),
        inputs, torch.float32, torch.ones_like(inputs["x"]), torch.ones_like(inputs["initial_states"]),
    )  # fmt: skip
    assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("starts", [None, [7, 20]])
def test_decays_are_exact_or_too_small_to_count_and_never_subnormal(dtype, starts):
    steps = -torch.tensor([[1e-4, 0.5, 3.0, 9.0]], dtype=dtype).expand(1, 37, 4).unsqueeze(2)
    steps = steps * (1 + torch.rand(37, generator=torch.Generator().manual_seed(0), dtype=dtype)).view(1, 37, 1, 1)
    idx = None if starts is None else documents(1, 37, starts)
    decays = Decays(steps, idx, 16)
    smallest = torch.finfo(dtype).tiny
    # an exponent of 64 is rounded twice, each time by half of its last place
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    for chunk, (start, stop) in enumerate([(0, 16), (16, 32), (32, 37)]):
        total = steps[0, start:stop, 0].double().cumsum(dim=0)  # [chunk, heads]
        between = (total.unsqueeze(1) - total.unsqueeze(0)).permute(2, 0, 1).tril().exp().tril()
        before, after = total.exp(), (total[-1] - total).exp()
        across = total[-1].exp()
        if idx is not None:
            document, seen = idx[0, start:stop], idx[0, max(start - 1, 0)]
            between = between * (document.unsqueeze(1) == document.unsqueeze(0))
            before = before * (document == seen).unsqueeze(1)
            after = after * (document == document[-1]).unsqueeze(1)
            across = across * (document[-1] == seen)
        got = decays.of_chunk(chunk, stop - start)
        parts = (got.pairs[0, 0], between), (got.from_start[0, :, 0], before), (got.to_end[0, :, 0], after)
        for mine, wanted in (*parts, (got.across[0, 0], across)):
            torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=2e-28)
            assert (mine[wanted == 0] == 0).all()
            assert ((mine == 0) | (mine >= smallest)).all()


@pytest.mark.parametrize("batch, seq", [(0, 8), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_give_zero_gradients(batch, seq, packed):
    inputs = make_inputs(batch, seq, 4, 8, 2, 4)
    d_y, d_final = torch.zeros_like(inputs["x"]), torch.zeros_like(inputs["initial_states"])
    idx = torch.zeros(batch, seq, dtype=torch.int32) if packed else None
    got = grads(
        lambda **kw: ssd_scan(**kw, chunk_size=4, seq_idx=idx, return_final_states=True),
        inputs, torch.float32, d_y, d_final,
    )  # fmt: skip
    for name in ("A", "D", "dt_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name]))
    assert got["y"].shape == inputs["x"].shape


def test_chunk_size_does_not_matter_and_softplus_can_be_off():
    inputs = {k: v.float() for k, v in make_inputs(1, 50, 4, 8, 1, 8).items()}
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = inputs["dt_bias"].abs()
    outputs = [ssd_scan(**inputs, chunk_size=size, dt_softplus=False) for size in (1, 7, 50, 256)]
    for y in outputs[1:]:
        assert (y - outputs[0]).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_bfloat16_is_near_float32():
    inputs = make_inputs(2, 100, 4, 16, 1, 16)
    low = {k: v.bfloat16() if k in "xBC" else v.float() for k, v in inputs.items()}
    y = ssd_scan(**low, chunk_size=32)
    want = ssd_scan(**{k: v.float() for k, v in low.items()}, chunk_size=32)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).abs().max() <= 0.02 * want.abs().max()


def test_steps_follow_the_scan():
    inputs = {k: v.float() for k, v in make_inputs(2, 9, 4, 8, 2, 8).items()}
    y, final = ssd_scan(**inputs, chunk_size=4, return_final_states=True)
    state = inputs["initial_states"].clone()
    A, D, bias = inputs["A"], inputs["D"], inputs["dt_bias"]
    for t in range(9):
        x, dt, B, C = (inputs[k][:, t] for k in ("x", "dt", "B", "C"))
        step = ssd_step(state, x, dt, A, B, C, D, bias)
        assert (step - y[:, t]).abs().max() <= 1e-5 * y.abs().max()
    assert (state - final).abs().max() <= 1e-5 * final.abs().max()


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator's result had, views of expanded tensors not counted."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_full_state_is_never_held():
    batch, seq, nheads, head_dim, d_state = 1, 1024, 4, 16, 64
    inputs = {k: v.float() for k, v in make_inputs(batch, seq, nheads, head_dim, 1, d_state).items()}
    d_y, d_final = torch.ones_like(inputs["x"]), torch.ones_like(inputs["initial_states"])
    with LargestTensor() as largest:
        grads(lambda **kw: ssd_scan(**kw, chunk_size=64, return_final_states=True), inputs, torch.float32, d_y, d_final)
    full = batch * seq * nheads * head_dim * d_state
    assert 0 < largest.numel <= full // 16


@pytest.mark.parametrize(
    "change, word",
    [
        ({"dt": torch.zeros(1, 3, 4)}, "dt must be"),
        ({"B": torch.zeros(1, 8, 3, 4), "C": torch.zeros(1, 8, 3, 4)}, "multiple of ngroups"),
        ({"B": torch.zeros(1, 8, 1, 4).bfloat16()}, "one dtype"),
        ({"initial_states": torch.zeros(1, 4, 4, 4)}, "initial_states must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, word):
    inputs = {k: v.float() for k, v in make_inputs(1, 8, 4, 8, 1, 4).items()}
    with pytest.raises(ValueError, match=word):
        ssd_scan(**{**inputs, **change}, chunk_size=4)
