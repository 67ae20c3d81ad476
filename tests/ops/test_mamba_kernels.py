"""Our scans beside the published kernels: Triton's, interpreted on a CPU, and on a GPU the real ones."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_marks import needs_cuda

from megatron_adamba.ops import causal_conv, dispatch, selective_scan, ssd

ORACLE = Path(__file__).parents[1] / "oracles" / "mamba_triton.py"


def scan_case(packed, ngroups):
    gen = torch.Generator().manual_seed(3)
    batch, seq, nheads, head_dim, d_state = 2, 40, 4, 16, 16

    def rand(*shape):
        return torch.randn(*shape, generator=gen)

    seq_idx = None
    if packed:
        seq_idx = torch.zeros(batch, seq, dtype=torch.int32)
        seq_idx[:, 7:] += 1
        seq_idx[0, 16:] += 1
        seq_idx[1, 30:] += 1
    inputs = {
        "x": rand(batch, seq, nheads, head_dim),
        "dt": rand(batch, seq, nheads),
        "A": -rand(nheads).exp(),
        "B": rand(batch, seq, ngroups, d_state),
        "C": rand(batch, seq, ngroups, d_state),
        "D": rand(nheads),
        "dt_bias": rand(nheads),
        "initial_states": rand(batch, nheads, head_dim, d_state),
    }
    d_y, d_final = rand(batch, seq, nheads, head_dim), rand(batch, nheads, head_dim, d_state)
    return {"inputs": inputs, "d_y": d_y, "d_final": d_final, "seq_idx": seq_idx, "chunk_size": 16, "steps": not packed}


def run_ours(case):
    leaves = {name: t.clone().requires_grad_() for name, t in case["inputs"].items()}
    y, final = ssd.ssd_scan(**leaves, chunk_size=8, seq_idx=case["seq_idx"], return_final_states=True)
    torch.autograd.backward([y, final], [case["d_y"], case["d_final"]])
    return {"y": y.detach(), "final": final.detach(), **{name: t.grad for name, t in leaves.items()}}


@pytest.mark.oracle
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "mamba_ssm", "einops")),
    reason="needs triton and mamba_ssm (pip install --no-deps mamba-ssm triton einops)",
)
@pytest.mark.parametrize("packed, ngroups", [(False, 2), (True, 1)])
def test_ssd_is_mamba_ssms_triton_kernel(packed, ngroups, tmp_path):
    case = scan_case(packed, ngroups)
    torch.save(case, tmp_path / "in.pt")
    command = [sys.executable, str(ORACLE), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    want = torch.load(tmp_path / "out.pt", weights_only=True)
    got = run_ours(case)
    if case["steps"]:
        c = case["inputs"]
        state = c["initial_states"].clone()
        now = [c[k][:, 0] for k in ("x", "dt")]
        got["step_y"] = ssd.ssd_step(state, *now, c["A"], c["B"][:, 0], c["C"][:, 0], c["D"], c["dt_bias"])
        got["step_state"] = state
    for name, expected in want.items():
        error = (got[name] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e} of its largest magnitude"


def test_without_cuda_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = set(sys.modules)
    kernels = dispatch.available_kernels()
    assert {"ssd_scan", "selective_scan", "causal_conv1d", "state_update"} <= set(kernels)
    assert all(text.startswith("PyTorch: ") for text in kernels.values())
    assert not {name for name in set(sys.modules) - before if name.startswith(("mamba_ssm", "causal_conv1d"))}


def test_seq_idx_is_counted_from_zero():
    idx = dispatch._from_zero(torch.tensor([[4, 4, 5], [0, 2, 2]]))
    assert idx.tolist() == [[0, 0, 1], [0, 2, 2]] and idx.dtype == torch.int32


def near(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


@needs_cuda
class TestOnCuda:
    """Whatever dispatch chooses on this machine must agree with the PyTorch kernels."""

    @pytest.mark.parametrize("packed", [False, True])
    def test_ssd_scan(self, packed):
        case = scan_case(packed, 1)
        leaves = {k: v.cuda().requires_grad_() for k, v in case["inputs"].items()}
        idx = None if case["seq_idx"] is None else case["seq_idx"].cuda() + 5
        results = []
        for function in (dispatch.ssd_scan, ssd.ssd_scan):
            y, final = function(**leaves, chunk_size=16, seq_idx=idx, return_final_states=True)
            seeds = [case["d_y"].cuda(), case["d_final"].cuda()]
            results.append([y, final, *torch.autograd.grad([y, final], list(leaves.values()), seeds)])
        near(*results, 1e-2)  # Triton's float32 dots may use TF32

    def test_ssd_step(self):
        c = {k: v.cuda() for k, v in scan_case(False, 2)["inputs"].items()}
        states = [c["initial_states"].clone() for _ in range(2)]
        args = (c["x"][:, 0], c["dt"][:, 0], c["A"], c["B"][:, 0], c["C"][:, 0], c["D"], c["dt_bias"])
        ys = [f(s, *args) for f, s in zip((dispatch.ssd_step, ssd.ssd_step), states)]
        near([ys[0], states[0]], [ys[1], states[1]], 1e-4)

    def test_selective_scan(self):
        torch.manual_seed(0)
        u, delta, z = (torch.randn(2, 70, 32, device="cuda", requires_grad=True) for _ in range(3))
        B, C = (torch.randn(2, 70, 16, device="cuda", requires_grad=True) for _ in range(2))
        A = -torch.rand(32, 16, device="cuda")
        leaves = [u, delta, z, B, C]
        results = []
        for function in (dispatch.selective_scan, selective_scan.selective_scan):
            y = function(u, delta, A, B, C, z=z)
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        near(*results, 1e-3)

    @pytest.mark.parametrize("packed", [False, True])
    def test_causal_conv1d(self, packed):
        torch.manual_seed(0)
        wide = torch.randn(2, 50, 96, device="cuda", requires_grad=True)
        weight, bias = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((64, 4), (64,)))
        idx = (torch.arange(50, device="cuda") // 13).expand(2, -1) if packed else None
        results = []
        for function in (dispatch.causal_conv1d, causal_conv.causal_conv1d):
            y = function(wide[..., 16:80], weight, bias, idx)
            results.append([y, *torch.autograd.grad(y.sum(), [wide, weight, bias])])
        near(*results, 1e-3)
