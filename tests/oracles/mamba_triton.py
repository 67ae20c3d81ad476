"""Runs mamba-ssm's own Triton kernels on a CPU, through Triton's interpreter. A script: it patches torch.cuda.

    python mamba_triton.py IN OUT

IN is a torch.save file {"inputs": {name: tensor}, "d_y", "d_final", "seq_idx" or None, "chunk_size"}; OUT gets
{"y", "final", and every input's gradient by name}, computed by `mamba_chunk_scan_combined`; and with "steps" in IN also
"step_y" and "step_state" of `selective_state_update` on the first token.
"""

import contextlib
import importlib.util
import os
import sys
import types
from pathlib import Path

# Triton reads the first when a kernel is decorated; the second leaves one configuration per kernel and no atomics.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget


class InterpreterDriver:
    """What Triton asks its active driver for, answered by a CPU."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1)

    def clear_cache(self, cache):
        pass

    def get_benchmarker(self):
        def run_once(function, **_):
            function()
            return [0.0, 0.0, 0.0]

        return run_once


def prepare() -> None:
    """Makes `mamba_ssm.ops.triton` importable without its package's __init__, which wants CUDA extensions."""
    triton.runtime.driver.set_active(InterpreterDriver())
    torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(multi_processor_count=1)
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
    sys.modules["mamba_ssm"] = package


def scan(case: dict) -> dict:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    leaves = {name: t.clone().requires_grad_() for name, t in case["inputs"].items()}
    y, final = mamba_chunk_scan_combined(
        **leaves, chunk_size=case["chunk_size"], seq_idx=case["seq_idx"], dt_softplus=True, return_final_states=True
    )
    torch.autograd.backward([y, final], [case["d_y"], case["d_final"]])
    return {"y": y.detach(), "final": final.detach(), **{name: t.grad for name, t in leaves.items()}}


def first_step(inputs: dict) -> dict:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state = inputs["initial_states"].clone()
    _, nheads, head_dim, d_state = state.shape
    y = selective_state_update(
        state,
        inputs["x"][:, 0].contiguous(),
        inputs["dt"][:, 0].unsqueeze(-1).expand(-1, -1, head_dim),
        inputs["A"][:, None, None].expand(nheads, head_dim, d_state),
        inputs["B"][:, 0].contiguous(),
        inputs["C"][:, 0].contiguous(),
        D=inputs["D"][:, None].expand(nheads, head_dim),
        dt_bias=inputs["dt_bias"][:, None].expand(nheads, head_dim),
        dt_softplus=True,
    )
    return {"step_y": y, "step_state": state}


def main(source: str, target: str) -> None:
    prepare()
    case = torch.load(source, weights_only=True)
    result = scan(case)
    if case["steps"]:
        result |= first_step(case["inputs"])
    torch.save(result, Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
