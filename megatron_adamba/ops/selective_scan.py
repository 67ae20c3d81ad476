"""Mamba-1's selective scan in plain PyTorch, and its single-token step.

Per channel d and state n, with the step D_t = softplus(delta_t + bias) (Gu and Dao, "Mamba", arXiv 2312.00752, eq. 2
and 4, algorithm 2; B discretised to first order, as the published kernels do):

    h_t = exp(D_t * A) * h_{t-1} + D_t * B_t * u_t          y_t = C_t . h_t + D u_t

A's decays differ for every (d, n), so there is no matmul form. The sequence is cut into segments, a segment into
chunks, and the recurrence runs over the positions inside a chunk for all chunks of the segment and a block of channels
at once: first from zero, which gives what each chunk adds to the state; then, the chunks' first states known, for good.
Nothing is ever divided by a decay, so none can overflow. The workspace is a few [batch, segment, channel block,
d_state] tensors.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adamba.ops.blocks import accumulation_dtype, sequence_blocks
from megatron_adamba.ops.gated_norm import silu_gate


class _Segment(NamedTuple):
    """One segment's inputs, padded to whole chunks and seen position first: [positions, batch, chunks, ...]."""

    span: slice
    step: Tensor  # [positions, batch, chunks, d_inner], 0 in the padding: the state stands still there
    u: Tensor  # like step
    B: Tensor  # [positions, batch, chunks, ngroups, d_state]
    C: Tensor  # like B
    keep: Tensor | None  # [positions, batch, chunks, 1, 1]: 0 where a document starts


def _positions_first(t: Tensor, positions: int, value: float = 0.0) -> Tensor:
    """[batch, length, ...] -> [positions, batch, chunks, ...], padding the length to whole chunks."""
    length = t.shape[1]
    chunks = -(-length // positions)
    if chunks * positions != length:
        t = torch.cat([t, t.new_full((t.shape[0], chunks * positions - length, *t.shape[2:]), value)], dim=1)
    return t.unflatten(1, (chunks, positions)).movedim(2, 0)


def _sequence_first(t: Tensor, length: int) -> Tensor:
    """The inverse of `_positions_first`."""
    return t.movedim(0, 2).flatten(1, 2)[:, :length]


class _Scan:
    """The inputs of a scan in the accumulation dtype, segment by segment and channel block by channel block."""

    segment_length = 256

    def __init__(self, u, delta, A, B, C, D, delta_bias, seq_idx, delta_softplus):
        self.batch, self.seq, self.d_inner = u.shape
        self.groups, self.d_state = B.shape[2:]
        self.u, self.delta, self.B, self.C, self.seq_idx = u, delta, B, C, seq_idx
        self.acc = acc = accumulation_dtype(u.dtype)
        self.A = A.to(acc)
        self.D = None if D is None else D.to(acc)
        self.bias = None if delta_bias is None else delta_bias.to(acc)
        self.softplus = delta_softplus
        size = self.segment_length
        self.spans = [slice(i, min(i + size, self.seq)) for i in range(0, self.seq, size)]
        # (group, channels of that group) pairs small enough for the cache.
        per_group = self.d_inner // self.groups
        per_channel = self.batch * min(size, self.seq) * self.d_state // 2
        cuts = sequence_blocks(per_group, per_channel, u.device)
        self.channel_blocks = [
            (g, slice(g * per_group + cut.start, g * per_group + cut.stop)) for g in range(self.groups) for cut in cuts
        ]

    def raw_step(self, span: slice) -> Tensor:
        raw = self.delta[:, span].to(self.acc)
        return raw if self.bias is None else raw + self.bias

    def segment(self, span: slice) -> _Segment:
        positions = max(1, math.isqrt(span.stop - span.start))
        raw = self.raw_step(span)
        step = _positions_first(F.softplus(raw) if self.softplus else raw, positions)
        u, B, C = (_positions_first(t[:, span].to(self.acc), positions) for t in (self.u, self.B, self.C))
        keep = None
        if self.seq_idx is not None:
            idx = self.seq_idx[:, span]
            before = self.seq_idx[:, max(span.start - 1, 0)].unsqueeze(1)
            same = idx == torch.cat([before, idx[:, :-1]], dim=1)
            keep = _positions_first(same.to(self.acc), positions, 1.0)[..., None, None]
        return _Segment(span, step, u, B, C, keep)

    def decays(self, seg: _Segment, channels: slice) -> tuple[Tensor, Tensor]:
        """exp(step * A): [positions, batch, chunks, block, d_state]; its product over positions without the first."""
        A = self.A[channels]
        decay = (seg.step[..., channels].unsqueeze(-1) * A).exp_()
        if seg.keep is not None:
            decay.mul_(seg.keep)
        over_chunk = (seg.step[..., channels].sum(dim=0).unsqueeze(-1) * A).exp_()
        if seg.keep is not None:
            over_chunk.mul_(seg.keep.amin(dim=0))
        return decay, over_chunk

    def states(self, seg: _Segment, group: int, channels: slice, state: Tensor):
        """Runs the recurrence over one segment and block from `state` [batch, block, d_state].

        Returns (states after each token [positions, batch, chunks, block, d_state], states before each chunk [batch,
        chunks, block, d_state], the segment's last state, decays, decays over a chunk).
        """
        decay, over_chunk = self.decays(seg, channels)
        weight = (seg.step[..., channels] * seg.u[..., channels]).unsqueeze(-1)
        h = weight * seg.B[..., group, None, :]
        first, last = _chunk_carries(h, decay, over_chunk, state)
        previous = first
        for i in range(h.shape[0]):
            previous = torch.addcmul(h[i], decay[i], previous, out=h[i])
        return h, first, last, decay, over_chunk


def _chunk_carries(added: Tensor, decay: Tensor, over_chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk [batch, chunks, ...] and after the last [batch, ...], from the one before the first.

    added, decay [positions, batch, chunks, ...]; over_chunk [batch, chunks, ...], the product of a chunk's decays.
    """
    local = added[0].clone()
    for i in range(1, added.shape[0]):
        torch.addcmul(added[i], decay[i], local, out=local)
    first = torch.empty_like(over_chunk)
    for c in range(first.shape[1]):
        first[:, c] = state
        state = torch.addcmul(local[:, c], over_chunk[:, c], state)
    return first, state


def _reverse_states(d_h: Tensor, decay: Tensor, over_chunk: Tensor, d_state: Tensor) -> Tensor:
    """Turns the outputs' gradients on the states, `d_h`, into the whole gradients in place, from the last token back.

    d_h_t += decay_{t+1} * d_h_{t+1}. d_state [batch, ...] is d of the state after the segment; returns d of the one
    before it.
    """
    positions = d_h.shape[0]
    local = d_h[-1].clone()
    for i in range(positions - 2, -1, -1):
        torch.addcmul(d_h[i], decay[i + 1], local, out=local)
    local.mul_(decay[0])
    for c in range(over_chunk.shape[1] - 1, -1, -1):
        d_h[-1, :, c] += d_state
        d_state = torch.addcmul(local[:, c], over_chunk[:, c], d_state)
    for i in range(positions - 2, -1, -1):
        d_h[i].addcmul_(decay[i + 1], d_h[i + 1])
    return d_state


class _SegmentGrads:
    """One segment's gradients, position first like the segment itself."""

    def __init__(self, scan: _Scan, seg: _Segment, dy: Tensor):
        self.dy = _positions_first(dy.to(scan.acc), seg.step.shape[0])
        self.u = torch.empty_like(seg.u, memory_format=torch.contiguous_format)
        self.step = torch.empty_like(self.u)
        self.B = torch.zeros_like(seg.B, memory_format=torch.contiguous_format)
        self.C = torch.zeros_like(self.B)


def _backward_block(scan: _Scan, seg: _Segment, g: _SegmentGrads, group: int, channels: slice, state, d_state, dA):
    """Fills one block's share of `g` and dA; returns d of the state before the segment, [batch, block, d_state]."""
    h, first, _, decay, over_chunk = scan.states(seg, group, channels, state)
    dy = g.dy[..., channels].unsqueeze(-1)
    step, u = seg.step[..., channels], seg.u[..., channels]
    g.C[..., group, :] += (h * dy).sum(dim=-2)
    d_h = dy * seg.C[..., group, None, :]
    d_state = _reverse_states(d_h, decay, over_chunk, d_state)
    # d(step * A) = d_h_t * h_{t-1} * decay_t, in the place of the decays.
    decay[0].mul_(first).mul_(d_h[0])
    decay[1:].mul_(h[:-1]).mul_(d_h[1:])
    dA[channels] += torch.mul(decay, step.unsqueeze(-1), out=h).sum(dim=(0, 1, 2))
    d_step = decay.mul_(scan.A[channels]).sum(dim=-1)
    d_weight = torch.mul(d_h, seg.B[..., group, None, :], out=h).sum(dim=-1)  # d(step * u)
    g.B[..., group, :] += d_h.mul_((step * u).unsqueeze(-1)).sum(dim=-2)
    g.step[..., channels] = d_step.addcmul_(d_weight, u)
    g.u[..., channels] = d_weight.mul_(step)
    return d_state


class _SelectiveScan(torch.autograd.Function):
    """y and the final state; keeps its inputs and one state per segment."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, initial_states, seq_idx, delta_softplus):
        scan = _Scan(u, delta, A, B, C, D, delta_bias, seq_idx, delta_softplus)
        state = torch.zeros(scan.batch, scan.d_inner, scan.d_state, dtype=scan.acc, device=u.device)
        if initial_states is not None:
            state.copy_(initial_states)
        starts = torch.empty((len(scan.spans), *state.shape), dtype=scan.acc, device=u.device)
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        for i, span in enumerate(scan.spans):
            starts[i] = state
            seg = scan.segment(span)
            out = torch.empty_like(seg.u, memory_format=torch.contiguous_format)
            for group, channels in scan.channel_blocks:
                h, _, last, *_ = scan.states(seg, group, channels, starts[i, :, channels])
                state[:, channels] = last
                out[..., channels] = h.mul_(seg.C[..., group, None, :]).sum(dim=-1)
            if scan.D is not None:
                out.addcmul_(seg.u, scan.D)
            y[:, span] = _sequence_first(out, span.stop - span.start)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, initial_states, seq_idx, starts)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        u, delta, A, B, C, D, delta_bias, initial_states, seq_idx, starts = ctx.saved_tensors
        scan = _Scan(u, delta, A, B, C, D, delta_bias, seq_idx, ctx.delta_softplus)
        dy = torch.zeros_like(u) if dy is None else dy
        d_state = torch.zeros(starts.shape[1:], dtype=scan.acc, device=u.device)
        if d_final is not None:
            d_state.copy_(d_final)
        du, d_delta = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(delta)
        dB, dC, dA = torch.empty_like(B), torch.empty_like(C), torch.zeros_like(scan.A)
        dD = torch.zeros(scan.d_inner, dtype=scan.acc, device=u.device)
        d_bias = torch.zeros_like(dD)
        for i in range(len(scan.spans) - 1, -1, -1):
            span = scan.spans[i]
            length = span.stop - span.start
            seg = scan.segment(span)
            g = _SegmentGrads(scan, seg, dy[:, span])
            for group, channels in scan.channel_blocks:
                d_state[:, channels] = _backward_block(
                    scan, seg, g, group, channels, starts[i, :, channels], d_state[:, channels], dA
                )
            if scan.D is not None:
                g.u.addcmul_(g.dy, scan.D)
                dD += (g.dy * seg.u).sum(dim=(0, 1, 2))
            d_raw = _sequence_first(g.step, length)
            if ctx.delta_softplus:
                d_raw = d_raw * torch.sigmoid(scan.raw_step(span))
            d_bias += d_raw.sum(dim=(0, 1))
            d_delta[:, span] = d_raw
            du[:, span] = _sequence_first(g.u, length)
            dB[:, span], dC[:, span] = _sequence_first(g.B, length), _sequence_first(g.C, length)
        return (
            du, d_delta, dA.to(A.dtype), dB, dC,
            None if D is None else dD.to(D.dtype),
            None if delta_bias is None else d_bias.to(delta_bias.dtype),
            None if initial_states is None else d_state.to(initial_states.dtype),
            None, None,
        )  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's scan over whole sequences (arXiv 2312.00752, algorithm 2), differentiable once.

    u and delta [batch, seq, d_inner]; A [d_inner, d_state], negative; B and C [batch, seq, d_state] or [batch, seq,
    ngroups, d_state], where each group serves d_inner // ngroups neighbouring channels; D and delta_bias [d_inner]; z
    like u: y is multiplied by silu(z); initial_states [batch, d_inner, d_state]. seq_idx, [batch, seq], never
    decreasing, numbers packed documents: each starts from a zero state, only the first of a row from initial_states,
    and the final state is the last one's. Any seq and any batch, also 0.

    Computes in float32 (float64 for float64). Returns y like u, and with `return_final_states` also the last state,
    [batch, d_inner, d_state] in that dtype; gradients flow through both. Raises ValueError where shapes do not fit.
    """
    check_scan_inputs(u, delta, A, B, C, seq_idx, initial_states)
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    y, final = _SelectiveScan.apply(u, delta, A, B, C, D, delta_bias, initial_states, seq_idx, delta_softplus)
    if z is not None:
        y = silu_gate(y, z)
    return (y, final) if return_final_states else y


def check_scan_inputs(u, delta, A, B, C, seq_idx=None, initial_states=None) -> None:
    """Raises ValueError unless the shapes are those that `selective_scan` documents."""
    if u.dim() != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must both be [batch, seq, d_inner], not {tuple(u.shape)}, {tuple(delta.shape)}")
    batch, seq, d_inner = u.shape
    if A.dim() != 2 or A.shape[0] != d_inner:
        raise ValueError(f"A must be [{d_inner}, d_state], not {tuple(A.shape)}")
    d_state = A.shape[1]
    if B.dim() not in (3, 4) or B.shape != C.shape or B.shape[:2] != (batch, seq) or B.shape[-1] != d_state:
        raise ValueError(
            f"B and C must be [{batch}, {seq}, {d_state}] or [{batch}, {seq}, ngroups, {d_state}], "
            f"not {tuple(B.shape)} and {tuple(C.shape)}"
        )
    if B.dim() == 4 and d_inner % B.shape[2]:
        raise ValueError(f"d_inner must be a multiple of ngroups, but they are {d_inner} and {B.shape[2]}")
    if seq_idx is not None and seq_idx.shape != (batch, seq):
        raise ValueError(f"seq_idx must be {(batch, seq)}, not {tuple(seq_idx.shape)}")
    if initial_states is not None and initial_states.shape != (batch, d_inner, d_state):
        raise ValueError(f"initial_states must be {(batch, d_inner, d_state)}, not {tuple(initial_states.shape)}")


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """One token of the recurrence, for generation; advances `state` [batch, d_inner, d_state] in place.

    u and delta [batch, d_inner]; A [d_inner, d_state]; B and C [batch, d_state] or [batch, ngroups, d_state]; D and
    delta_bias [d_inner]. Computes in the state's dtype and returns y like u. Not differentiable.
    """
    acc = state.dtype
    batch, d_inner, d_state = state.shape
    B, C = (t.to(acc).reshape(batch, -1, 1, d_state) for t in (B, C))
    step = delta.to(acc) if delta_bias is None else delta.to(acc) + delta_bias.to(acc)
    step = F.softplus(step) if delta_softplus else step
    wide = u.to(acc)
    state.mul_((step.unsqueeze(-1) * A.to(acc)).exp_())
    grouped = state.view(batch, B.shape[1], -1, d_state)
    grouped.addcmul_((step * wide).view(*grouped.shape[:3], 1), B)
    y = (grouped * C).sum(dim=-1).view(batch, d_inner)
    if D is not None:
        y.addcmul_(wide, D.to(acc))
    return y.to(u.dtype)
