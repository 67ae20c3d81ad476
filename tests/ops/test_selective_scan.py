"""Mamba-1's scan against its recurrence, written out step by step in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adamba.ops.selective_scan import selective_scan, selective_scan_step


def recurrence(u, delta, A, B, C, D, z, delta_bias, initial_states, seq_idx):
    batch, seq, d_inner = u.shape
    B, C = (t.repeat_interleave(d_inner // t.shape[2], dim=2) for t in (B, C))
    step = F.softplus(delta + delta_bias)
    state, outputs = initial_states, []
    for t in range(seq):
        if t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(batch, 1, 1)
        state = torch.exp(step[:, t, :, None] * A) * state + (step[:, t] * u[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1) * F.silu(z), state


def make_inputs(batch, seq, d_inner, ngroups, d_state, decay=1.0):
    gen = torch.Generator().manual_seed(seq)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return {
        "u": rand(batch, seq, d_inner),
        "delta": rand(batch, seq, d_inner),
        "A": -decay * rand(d_inner, d_state).exp(),
        "B": rand(batch, seq, ngroups, d_state),
        "C": rand(batch, seq, ngroups, d_state),
        "D": rand(d_inner),
        "z": rand(batch, seq, d_inner),
        "delta_bias": rand(d_inner),
        "initial_states": rand(batch, d_inner, d_state),
    }


def grads(function, inputs, dtype, d_y, d_final):
    leaves = {k: v.detach().clone().to(dtype).requires_grad_() for k, v in inputs.items()}
    y, final = function(**leaves)
    torch.autograd.backward([y, final], [d_y.to(y.dtype), d_final.to(final.dtype)])
    return {"y": y.detach(), "final": final.detach(), **{k: v.grad for k, v in leaves.items()}}


CASES = {
    # batch, seq, d_inner, ngroups, d_state, document starts, decay; a segment is 256 tokens, a chunk its square root
    "ragged": (2, 37, 8, 1, 4, [], 1.0),
    "groups": (2, 45, 12, 3, 4, [20], 1.0),
    "documents over segments": (2, 300, 4, 1, 4, [5, 16, 17, 256, 270], 1.0),
    "one token": (1, 1, 4, 1, 4, [], 1.0),
    "strong decay": (1, 40, 4, 1, 4, [], 30.0),
}


@pytest.mark.oracle
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case, dtype, tolerance):
    *sizes, starts, decay = CASES[case]
    inputs = make_inputs(*sizes, decay=decay)
    idx = torch.full((sizes[0], sizes[1]), 2, dtype=torch.int32)
    for start in starts:
        idx[:, start:] += 1
    d_y, d_final = torch.randn_like(inputs["u"]), torch.randn_like(inputs["initial_states"])
    want = grads(lambda **kw: recurrence(**kw, seq_idx=idx), inputs, torch.float64, d_y, d_final)
    got = grads(lambda **kw: selective_scan(**kw, seq_idx=idx, return_final_states=True), inputs, dtype, d_y, d_final)
    for name, expected in want.items():
        error = (got[name].double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e} of its largest magnitude"


def test_decay_underflow_gives_no_nan():
    inputs = make_inputs(1, 40, 4, 1, 4, decay=1e5)
    got = grads(
        lambda **kw: selective_scan(**kw, return_final_states=True),
        inputs, torch.float32, torch.ones_like(inputs["u"]), torch.ones_like(inputs["initial_states"]),
    )  # fmt: skip
    assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.parametrize("batch, seq", [(0, 8), (2, 0)])
def test_no_tokens_give_zero_gradients(batch, seq):
    inputs = make_inputs(batch, seq, 4, 1, 4)
    d_y, d_final = torch.zeros_like(inputs["u"]), torch.zeros_like(inputs["initial_states"])
    got = grads(lambda **kw: selective_scan(**kw, return_final_states=True), inputs, torch.float32, d_y, d_final)
    for name in ("A", "D", "delta_bias"):
        assert torch.equal(got[name], torch.zeros_like(got[name]))


def test_steps_follow_the_scan():
    inputs = {k: v.float() for k, v in make_inputs(2, 9, 8, 2, 4).items()}
    del inputs["z"]
    y, final = selective_scan(**inputs, return_final_states=True)
    state = inputs["initial_states"].clone()
    for t in range(9):
        now = [inputs[k][:, t] for k in ("u", "delta")]
        later = [inputs[k][:, t] for k in ("B", "C")]
        step = selective_scan_step(state, *now, inputs["A"], *later, inputs["D"], inputs["delta_bias"])
        assert (step - y[:, t]).abs().max() <= 1e-5 * y.abs().max()
    assert (state - final).abs().max() <= 1e-5 * final.abs().max()


class LargestTensor(TorchDispatchMode):
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
    batch, seq, d_inner, d_state = 1, 1024, 128, 32
    inputs = {k: v.float() for k, v in make_inputs(batch, seq, d_inner, 1, d_state).items()}
    d_y, d_final = torch.ones_like(inputs["u"]), torch.ones_like(inputs["initial_states"])
    with LargestTensor() as largest:
        grads(lambda **kw: selective_scan(**kw, return_final_states=True), inputs, torch.float32, d_y, d_final)
    assert 0 < largest.numel <= batch * seq * d_inner * d_state // 4


@pytest.mark.parametrize(
    "change, word",
    [
        ({"delta": torch.zeros(1, 3, 4)}, "u and delta"),
        ({"A": torch.zeros(3, 4)}, "A must be"),
        ({"B": torch.zeros(1, 8, 1, 5)}, "B and C must be"),
        ({"seq_idx": torch.zeros(1, 7)}, "seq_idx must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, word):
    inputs = {k: v.float() for k, v in make_inputs(1, 8, 4, 1, 4).items()}
    with pytest.raises(ValueError, match=word):
        selective_scan(**{**inputs, **change})
