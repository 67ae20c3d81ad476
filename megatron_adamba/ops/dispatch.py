"""Chooses a kernel per call: the published CUDA and Triton ones where they can serve, plain PyTorch everywhere else.

The functions here have the signatures and layouts of this package's own PyTorch kernels; `mamba_ssm` and
`causal_conv1d` are imported when the first CUDA tensor asks for them, and whatever goes wrong in that import only means
that PyTorch serves. Features are found by looking at a function's parameters, not at a version: builds with the same
version number differ.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adamba.ops import causal_conv, ssd
from megatron_adamba.ops import selective_scan as mamba1
from megatron_adamba.ops.gated_norm import silu_gate


class _Kernel(NamedTuple):
    function: Callable | None
    why: str  # what it is, or why there is none


class _Wanted(NamedTuple):
    module: str
    name: str
    parameters: str  # that we pass by name, or whose absence would mean another layout


@functools.cache
def _wanted() -> dict[str, _Wanted]:
    return {
        "ssd_scan": _Wanted(
            "mamba_ssm.ops.triton.ssd_combined",
            "mamba_chunk_scan_combined",
            "D z dt_bias initial_states seq_idx dt_softplus return_final_states",
        ),
        "selective_scan": _Wanted(
            "mamba_ssm.ops.selective_scan_interface",
            "selective_scan_fn",
            "D z delta_bias delta_softplus return_last_state",
        ),
        "state_update": _Wanted(
            "mamba_ssm.ops.triton.selective_state_update",
            "selective_state_update",
            "state x dt A B C D dt_bias dt_softplus",
        ),
        "causal_conv1d": _Wanted(
            "causal_conv1d", "causal_conv1d_fn", "x weight bias seq_idx initial_states activation"
        ),
        "causal_conv1d_update": _Wanted("causal_conv1d", "causal_conv1d_update", "x conv_state weight bias activation"),
    }


@functools.cache
def _kernel(name: str) -> _Kernel:
    """Imports one kernel, once a process."""
    wanted = _wanted()[name]
    # A build without its CUDA extension, or against another torch, raises anything from ImportError to RuntimeError.
    try:
        function = getattr(importlib.import_module(wanted.module), wanted.name)
        missing = set(wanted.parameters.split()) - set(inspect.signature(function).parameters)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return _Kernel(None, f"{wanted.module} does not import: {type(error).__name__}: {reason}")
    if missing:
        return _Kernel(None, f"{wanted.module}.{wanted.name} takes no {', '.join(sorted(missing))}")
    return _Kernel(function, f"{wanted.module}.{wanted.name}")


def available_kernels() -> dict[str, str]:
    """For each kernel name what serves CUDA tensors and why; without a CUDA device nothing is imported to find out."""
    if not torch.cuda.is_available():
        return dict.fromkeys(_wanted(), "PyTorch: no CUDA device")
    kernels = {name: _kernel(name) for name in _wanted()}
    return {name: k.why if k.function else f"PyTorch: {k.why}" for name, k in kernels.items()}


def _for(name: str, x: Tensor) -> Callable | None:
    """The kernel for a tensor, or None for PyTorch: on CPU, in float64, for no elements (no empty grid launches)."""
    if not x.is_cuda or x.numel() == 0 or x.dtype == torch.float64:
        return None
    return _kernel(name).function


def _from_zero(seq_idx: Tensor | None) -> Tensor | None:
    """int32, contiguous, counted from 0: the kernels give the incoming state to document 0 only."""
    if seq_idx is None:
        return None
    return (seq_idx - seq_idx[:, :1]).to(torch.int32).contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def ssd_scan(
    x, dt, A, B, C, chunk_size=128, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    dt_softplus=True, return_final_states=False,
):  # fmt: skip
    """`megatron_adamba.ops.ssd.ssd_scan`, and with z [batch, seq, nheads, head_dim] its y times silu(z)."""
    ssd.check_ssd_inputs(x, dt, A, B, C, seq_idx, initial_states)
    kernel = _for("ssd_scan", x)
    if kernel is None:
        out = ssd.ssd_scan(
            x, dt, A, B, C, chunk_size, D, dt_bias, initial_states, seq_idx, dt_softplus, return_final_states
        )
        if z is None:
            return out
        return (silu_gate(out[0], z), out[1]) if isinstance(out, tuple) else silu_gate(out, z)
    # Triton blocks are powers of two; the result does not depend on the chunk size.
    chunk_size = max(16, 1 << (chunk_size - 1).bit_length())
    return kernel(
        x, dt, A.float(), B, C, chunk_size, D=_float(D), z=z, dt_bias=_float(dt_bias),
        initial_states=_float(initial_states), seq_idx=_from_zero(seq_idx), dt_softplus=dt_softplus,
        return_final_states=return_final_states,
    )  # fmt: skip


def ssd_step(state, x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=True):
    """`megatron_adamba.ops.ssd.ssd_step`."""
    kernel = _for("state_update", x)
    if kernel is None:
        return ssd.ssd_step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    _, nheads, head_dim, d_state = state.shape
    # The kernel recognises per-head values by their zero strides, and needs D and dt_bias to be there.
    zeros = torch.zeros(nheads, dtype=torch.float32, device=x.device)
    D = zeros if D is None else D.float()
    bias = zeros if dt_bias is None else dt_bias.float()
    return kernel(
        state, x, dt.unsqueeze(-1).expand(-1, -1, head_dim), A.float()[:, None, None].expand(-1, head_dim, d_state),
        B, C, D=D.view(nheads, -1).expand(-1, head_dim), dt_bias=bias[:, None].expand(-1, head_dim),
        dt_softplus=dt_softplus,
    )  # fmt: skip


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, initial_states=None, seq_idx=None,
    return_final_states=False,
):  # fmt: skip
    """`megatron_adamba.ops.selective_scan.selective_scan`."""
    mamba1.check_scan_inputs(u, delta, A, B, C, seq_idx, initial_states)
    kernel = _for("selective_scan", u)
    # The CUDA kernel starts from zero, knows no documents, and its last state has no gradient.
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C))
    fits = initial_states is None and seq_idx is None and not (return_final_states and needs_grad)
    if kernel is None or not fits or A.shape[1] > 256:
        return mamba1.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_states, seq_idx, return_final_states
        )

    def channels_first(t):
        return t.transpose(1, 2)

    def states_first(t):  # [batch, seq, (groups,) d_state] -> [batch, (groups,) d_state, seq]
        return t.movedim(1, -1)

    out = kernel(
        channels_first(u), channels_first(delta.to(u.dtype)), A.float(), states_first(B.to(u.dtype)),
        states_first(C.to(u.dtype)), D=_float(D), z=None if z is None else channels_first(z.to(u.dtype)),
        delta_bias=_float(delta_bias), delta_softplus=delta_softplus, return_last_state=return_final_states,
    )  # fmt: skip
    if return_final_states:
        return channels_first(out[0]), out[1].float()
    return channels_first(out)


def selective_scan_step(state, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """`megatron_adamba.ops.selective_scan.selective_scan_step`."""
    kernel = _for("state_update", u)
    if kernel is None or B.dim() != 2:
        return mamba1.selective_scan_step(state, u, delta, A, B, C, D, delta_bias, delta_softplus)
    zeros = torch.zeros(u.shape[1], dtype=torch.float32, device=u.device)
    D = zeros if D is None else D.float()
    bias = zeros if delta_bias is None else delta_bias.float()
    return kernel(state, u, delta, A.float(), B, C, D=D, dt_bias=bias, dt_softplus=delta_softplus)


def causal_conv1d(x, weight, bias=None, seq_idx=None, initial_state=None, silu=True, return_final_state=False):
    """`megatron_adamba.ops.causal_conv.causal_conv1d`."""
    causal_conv.check_conv_inputs(x, weight, bias, seq_idx, initial_state)
    kernel = _for("causal_conv1d", x)
    channels, width = weight.shape
    # Documents and an incoming state exclude each other there, and rows are read 16 bytes at a time.
    fits = 2 <= width <= 4 and channels % 8 == 0 and (seq_idx is None or initial_state is None)
    if kernel is None or not fits:
        return causal_conv.causal_conv1d(x, weight, bias, seq_idx, initial_state, silu, return_final_state)
    if x.stride(2) != 1 or x.stride(1) % 8 or x.stride(0) % 8:
        x = x.contiguous()
    if initial_state is not None:  # channels last as well: [batch, channels, width - 1] with stride 1 over channels
        initial_state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y = kernel(
        x.transpose(1, 2), weight, bias, seq_idx=_from_zero(seq_idx), initial_states=initial_state,
        activation="silu" if silu else None,
    ).transpose(1, 2)  # fmt: skip
    if return_final_state:
        return y, causal_conv.final_conv_state(x, width, seq_idx, initial_state)
    return y


def causal_conv1d_step(x, conv_state, weight, bias=None, silu=True):
    """`megatron_adamba.ops.causal_conv.causal_conv1d_step`."""
    kernel = _for("causal_conv1d_update", x)
    if kernel is None or conv_state.dtype != x.dtype or not 2 <= weight.shape[1] <= 4:
        return causal_conv.causal_conv1d_step(x, conv_state, weight, bias, silu)
    return kernel(x, conv_state, weight, bias, "silu" if silu else None)
