"""Mamba-2's state space layer (SSD) in plain PyTorch: a chunked scan made of matmuls, and its single-token step.

Per head, with a_t = dt_t * A (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, eq. 16-18, discretised as there):

    h_t = exp(a_t) * h_{t-1} + dt_t * x_t B_t^T          y_t = h_t C_t + D x_t

Section 6 of the paper cuts the sequence into chunks. Inside a chunk the map from x to y is a lower triangular matrix
(C B^T) * exp(segment sums of a), like masked attention; between chunks only the state h is carried on.

Layout. Heads are seen as [ngroups, heads_per_group]. The state is kept as [batch * ngroups, d_state,
heads_per_group * head_dim], so that B and C, which a group's heads share, meet all of them in one matmul and are never
copied per head. Chunks run one after another: the largest workspace is one chunk's [batch, nheads, chunk, chunk].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adamba.ops.ssd_decay import ChunkDecay, Decays


class _Shape(NamedTuple):
    """Sizes that every helper needs; `heads` is the number of heads per group."""

    batch: int
    seq: int
    groups: int
    heads: int
    head_dim: int
    d_state: int


def _shape_of(x: Tensor, B: Tensor) -> _Shape:
    batch, seq, nheads, head_dim = x.shape
    ngroups, d_state = B.shape[2:]
    return _Shape(batch, seq, ngroups, nheads // ngroups, head_dim, d_state)


def _heads_first(t: Tensor) -> Tensor:
    """[batch, chunk, groups, heads, head_dim] -> [batch * groups * heads, chunk, head_dim], contiguous."""
    return t.permute(0, 2, 3, 1, 4).reshape(-1, t.shape[1], t.shape[4])


def _heads_packed(t: Tensor) -> Tensor:
    """[batch, chunk, groups, heads, head_dim] -> [batch * groups, chunk, heads * head_dim]; a view for one group."""
    batch, chunk, groups, heads, head_dim = t.shape
    return t.transpose(1, 2).reshape(batch * groups, chunk, heads * head_dim)


def _groups_first(t: Tensor) -> Tensor:
    """[batch, chunk, groups, d_state] -> [batch * groups, chunk, d_state]; a view for one group."""
    return t.transpose(1, 2).reshape(t.shape[0] * t.shape[2], t.shape[1], t.shape[3])


def _pack_state(state: Tensor, s: _Shape) -> Tensor:
    """[batch, nheads, head_dim, d_state] -> [batch * groups, d_state, heads * head_dim], a copy."""
    state = state.reshape(s.batch, s.groups, s.heads, s.head_dim, s.d_state).permute(0, 1, 4, 2, 3)
    return state.clone(memory_format=torch.contiguous_format).view(s.batch * s.groups, s.d_state, s.heads * s.head_dim)


def _unpack_state(state: Tensor, s: _Shape) -> Tensor:
    """The inverse of `_pack_state`."""
    state = state.view(s.batch, s.groups, s.d_state, s.heads, s.head_dim).permute(0, 1, 3, 4, 2)
    return state.reshape(s.batch, s.groups * s.heads, s.head_dim, s.d_state)


class _Chunks:
    """The inputs of a scan, seen by groups, and what forward and backward both derive from them chunk by chunk."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, seq_idx, chunk_size, dt_softplus):
        self.s = s = _shape_of(x, B)
        self.dtype = x.dtype
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = x.view(s.batch, s.seq, s.groups, s.heads, s.head_dim)
        self.B, self.C = B, C
        self.raw_dt = dt.to(self.acc) if dt_bias is None else dt.to(self.acc) + dt_bias.to(self.acc)
        dt = F.softplus(self.raw_dt) if dt_softplus else self.raw_dt
        self.dt = dt.view(s.batch, s.seq, s.groups, s.heads)
        self.A = A.to(self.acc).view(s.groups, s.heads)
        self.D = None if D is None else D.to(self.acc).view(s.groups, s.heads, -1)
        if x.device.type == "cpu":
            # The triangular part's work grows with the chunk, the states' shrinks: cores are fastest in between. On a
            # GPU fewer launches count for more.
            chunk_size = min(chunk_size, max(64, s.d_state))
        self.size = size = max(1, min(chunk_size, s.seq))
        self.spans = [slice(i, min(i + size, s.seq)) for i in range(0, s.seq, size)]
        self.decays = Decays(self.dt * self.A, seq_idx, size)

    def decay(self, span: slice) -> ChunkDecay:
        return self.decays.of_chunk(span.start // self.size, span.stop - span.start)

    def scaled_x(self, span: slice, scale: Tensor) -> Tensor:
        """x times a factor per token and head, in x's dtype: [batch, chunk, groups, heads, head_dim]."""
        return (self.x[:, span] * scale.unsqueeze(-1)).to(self.dtype)

    def across(self, decay: ChunkDecay) -> Tensor:
        """decay.across, shaped to multiply a state seen as [batch, groups, d_state, heads, head_dim]."""
        return decay.across[:, :, None, :, None]

    def state_view(self, state: Tensor) -> Tensor:
        s = self.s
        return state.view(s.batch, s.groups, s.d_state, s.heads, s.head_dim)

    def token_view(self, t: Tensor) -> Tensor:
        """[batch * groups, chunk, heads * head_dim] -> [batch, chunk, groups, heads, head_dim], a view."""
        s = self.s
        return t.view(s.batch, s.groups, t.shape[1], s.heads, s.head_dim).transpose(1, 2)

    def head_view(self, t: Tensor) -> Tensor:
        """[batch * groups * heads, chunk, head_dim] -> [batch, chunk, groups, heads, head_dim], a view."""
        s = self.s
        return t.view(s.batch, s.groups, s.heads, t.shape[1], s.head_dim).permute(0, 3, 1, 2, 4)

    def scores(self, span: slice) -> Tensor:
        """C B^T of a chunk, [batch, groups, 1, chunk, chunk], in the accumulation dtype."""
        cb = _groups_first(self.C[:, span]) @ _groups_first(self.B[:, span]).mT
        return cb.to(self.acc).view(self.s.batch, self.s.groups, 1, *cb.shape[1:])


def _forward_chunk(c: _Chunks, span: slice, state: Tensor, state_in: Tensor, out: Tensor) -> None:
    """Writes one chunk's y into `out` (its slice) and advances `state` in place."""
    length = span.stop - span.start
    decay = c.decay(span)
    mixing = decay.pairs.mul_(c.scores(span)).to(c.dtype).view(-1, length, length)
    within = mixing @ _heads_first(c.scaled_x(span, c.dt[:, span]))
    carried = c.token_view(_groups_first(c.C[:, span]) @ state_in).to(c.acc)
    y = torch.addcmul(c.head_view(within).to(c.acc), carried, decay.from_start.unsqueeze(-1))
    if c.D is not None:
        y.addcmul_(c.x[:, span].to(c.acc), c.D)
    out.copy_(y)
    update = _groups_first(c.B[:, span]).mT @ _heads_packed(c.scaled_x(span, c.dt[:, span] * decay.to_end))
    c.state_view(state).mul_(c.across(decay))
    state.add_(update)


class _Grads:
    """Gradient buffers of one backward pass; the small ones in the accumulation dtype."""

    def __init__(self, c: _Chunks):
        s = c.s
        self.x = torch.empty(c.x.shape, dtype=c.dtype, device=c.x.device)
        self.B = torch.empty(c.B.shape, dtype=c.dtype, device=c.x.device)
        self.C = torch.empty_like(self.B)
        self.dt = torch.empty_like(c.dt)
        self.A = torch.zeros_like(c.A)
        self.D = None if c.D is None else torch.zeros(s.groups, s.heads, s.head_dim, dtype=c.acc, device=c.x.device)


def _within_chunk_grads(c: _Chunks, span: slice, decay: ChunkDecay, dy: Tensor):
    """The triangular part's share: d(dt * x) by head, d(C B^T), and the decays' gradient per token.

    dy [batch, chunk, groups, heads, head_dim]. Spends `decay.pairs`.
    """
    length = span.stop - span.start
    s = c.s
    scores = c.scores(span)
    dy_h = _heads_first(dy)
    xdt_h = _heads_first(c.scaled_x(span, c.dt[:, span]))
    mixing = (decay.pairs * scores).to(c.dtype).view(-1, length, length)
    d_xdt = c.head_view(mixing.mT @ dy_h)
    d_pairs = (dy_h @ xdt_h.mT).view(s.batch, s.groups, s.heads, length, length)
    weighted = decay.pairs.mul_(d_pairs)  # d(mixing) * pairs
    d_scores = weighted.sum(dim=2)
    # a_t lies between every j < t <= i: the sum over rows from t on, less the sum over columns from t on. What is in
    # both must cancel, or it drowns the rest where the decay is strong: float64, and no diagonal.
    weighted.mul_(scores).diagonal(dim1=-2, dim2=-1).zero_()
    exact = weighted.double()
    d_total = (exact.sum(dim=-1) - exact.sum(dim=-2)).permute(0, 3, 1, 2)
    return d_xdt, d_scores.view(-1, length, length).to(c.dtype), d_total


def _backward_chunk(c: _Chunks, g: _Grads, span: slice, dy: Tensor, state_in: Tensor, d_state: Tensor) -> None:
    """Fills one chunk's gradients and turns `d_state`, d of the state after it, into d of the state before it.

    dy [batch, chunk, groups, heads, head_dim]; state_in in x's dtype, d_state in the accumulation dtype.
    """
    decay = c.decay(span)
    dt, x, wide_dy = c.dt[:, span], c.x[:, span].to(c.acc), dy.to(c.acc)
    B, C = _groups_first(c.B[:, span]), _groups_first(c.C[:, span])
    d_xdt, d_scores, d_total = _within_chunk_grads(c, span, decay, dy)

    # y += from_start * (C h_in)
    carried = c.token_view(C @ state_in)
    dy_scaled = wide_dy * decay.from_start.unsqueeze(-1)
    d_total = d_total + (dy_scaled * carried).sum(dim=-1)
    dy_packed = _heads_packed(dy_scaled.to(c.dtype))
    dC = torch.baddbmm(d_scores @ B, dy_packed, state_in.mT)

    # h_out = across * h_in + B^T (to_end * dt * x)
    d_out = d_state.to(c.dtype)
    reached = c.token_view(B @ d_out) * decay.to_end.unsqueeze(-1)
    dB = torch.baddbmm(d_scores.mT @ C, _heads_packed(c.scaled_x(span, dt * decay.to_end)), d_out.mT)
    d_view = c.state_view(d_state).mul_(c.across(decay))
    d_last = (d_view * c.state_view(state_in)).sum(dim=(2, 4))  # [batch, groups, heads]
    d_state.add_(C.mT @ dy_packed)

    # to_end reaches from j to the end, so its gradient belongs to every a_t with t > j.
    before = (reached * x).sum(dim=-1).mul_(dt)
    d_decay = d_total.flip(1).cumsum(1).flip(1).to(c.acc) + (before.cumsum(1) - before) + d_last.unsqueeze(1)

    d_xdt = reached.add_(d_xdt)
    g.dt[:, span] = (d_xdt * x).sum(dim=-1).addcmul_(d_decay, c.A)
    g.A += (d_decay * dt).sum(dim=(0, 1))
    dx = d_xdt.mul_(dt.unsqueeze(-1))
    if c.D is not None:
        dx.addcmul_(wide_dy, c.D)
        g.D += (wide_dy * x).sum(dim=(0, 1))
    g.x[:, span] = dx
    g.B[:, span] = dB.view(c.s.batch, c.s.groups, *dB.shape[1:]).transpose(1, 2)
    g.C[:, span] = dC.view(c.s.batch, c.s.groups, *dC.shape[1:]).transpose(1, 2)


class _SSDScan(torch.autograd.Function):
    """y and the final state; keeps its inputs and one state per chunk, and recomputes the rest in backward."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, chunk_size, dt_softplus):
        c = _Chunks(x, dt, A, B, C, D, dt_bias, seq_idx, chunk_size, dt_softplus)
        s = c.s
        packed = (s.batch * s.groups, s.d_state, s.heads * s.head_dim)
        if initial_states is None:
            state = torch.zeros(packed, dtype=c.acc, device=x.device)
        else:
            state = _pack_state(initial_states.to(c.acc), s)
        # In x's dtype: exactly what the matmuls read, so nothing is lost by keeping no more.
        states = torch.empty((len(c.spans), *packed), dtype=c.dtype, device=x.device)
        y = torch.empty(c.x.shape, dtype=c.dtype, device=x.device)
        for i, span in enumerate(c.spans):
            states[i].copy_(state)
            _forward_chunk(c, span, state, states[i], y[:, span])
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, states)
        ctx.chunk_size, ctx.dt_softplus = chunk_size, dt_softplus
        ctx.set_materialize_grads(False)
        return y.view(x.shape), _unpack_state(state, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, states = ctx.saved_tensors
        c = _Chunks(x, dt, A, B, C, D, dt_bias, seq_idx, ctx.chunk_size, ctx.dt_softplus)
        g, s = _Grads(c), c.s
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dy = dy.view(c.x.shape)
        if d_final is None:
            d_state = torch.zeros(s.batch * s.groups, s.d_state, s.heads * s.head_dim, dtype=c.acc, device=x.device)
        else:
            d_state = _pack_state(d_final.to(c.acc), s)
        for i in reversed(range(len(c.spans))):
            _backward_chunk(c, g, c.spans[i], dy[:, c.spans[i]], states[i], d_state)
        d_raw = g.dt.view(dt.shape)
        if ctx.dt_softplus:
            d_raw = d_raw * torch.sigmoid(c.raw_dt)
        d_D = None if g.D is None else (g.D if D.dim() == 2 else g.D.sum(-1)).view(D.shape).to(D.dtype)
        d_bias = None if dt_bias is None else d_raw.sum(dim=(0, 1)).to(dt_bias.dtype)
        d_initial = None if initial_states is None else _unpack_state(d_state, s).to(initial_states.dtype)
        return (
            g.x.view(x.shape), d_raw.to(dt.dtype), g.A.view(A.shape).to(A.dtype), g.B, g.C,
            d_D, d_bias, d_initial, None, None, None,
        )  # fmt: skip


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 128,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = True,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan over whole sequences (arXiv 2405.21060, section 6), differentiable once.

    x [batch, seq, nheads, head_dim]; dt [batch, seq, nheads]; A [nheads], negative; B and C [batch, seq, ngroups,
    d_state], where head i reads group i // (nheads // ngroups); D [nheads] or [nheads, head_dim]; dt_bias [nheads];
    initial_states [batch, nheads, head_dim, d_state]. The step is softplus(dt + dt_bias), or dt + dt_bias without
    `dt_softplus`. seq_idx, an integer [batch, seq] that never decreases along seq, numbers packed documents: each
    starts from a zero state, only the first of a row from initial_states, and the final state is the last one's.

    x, B and C share one dtype, in which the matmuls run; decays and the carried state are float32 (float64 for
    float64), and so are A, D and dt_bias whatever they arrive in. Any seq, also 0; any batch, also 0. A chunk has
    at most `chunk_size` tokens, on a CPU at most max(64, d_state).

    Returns y like x, and with `return_final_states` also the state after the last token, [batch, nheads, head_dim,
    d_state] in float32 or float64; gradients flow through both.
    Raises ValueError where shapes or dtypes do not fit.
    """
    check_ssd_inputs(x, dt, A, B, C, seq_idx, initial_states)
    if x.stride(-1) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3]):
        x = x.contiguous()
    y, final = _SSDScan.apply(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, chunk_size, dt_softplus)
    return (y, final) if return_final_states else y


def check_ssd_inputs(x, dt, A, B, C, seq_idx=None, initial_states=None) -> None:
    """Raises ValueError unless shapes and dtypes are those that `ssd_scan` documents."""
    if x.dim() != 4 or B.dim() != 4 or B.shape != C.shape or B.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"ssd_scan needs x [batch, seq, nheads, head_dim] and B, C [batch, seq, ngroups, d_state], "
            f"not {tuple(x.shape)}, {tuple(B.shape)} and {tuple(C.shape)}"
        )
    batch, seq, nheads, head_dim = x.shape
    ngroups, d_state = B.shape[2:]
    if nheads % ngroups:
        raise ValueError(f"nheads must be a multiple of ngroups, but they are {nheads} and {ngroups}")
    if dt.shape != x.shape[:3] or A.shape != (nheads,):
        raise ValueError(f"dt must be {tuple(x.shape[:3])} and A {(nheads,)}, not {tuple(dt.shape)}, {tuple(A.shape)}")
    if not x.dtype == B.dtype == C.dtype:
        raise ValueError(f"x, B and C must share one dtype, not {x.dtype}, {B.dtype} and {C.dtype}")
    if seq_idx is not None and seq_idx.shape != (batch, seq):
        raise ValueError(f"seq_idx must be {(batch, seq)}, not {tuple(seq_idx.shape)}")
    if initial_states is not None and initial_states.shape != (batch, nheads, head_dim, d_state):
        wanted = (batch, nheads, head_dim, d_state)
        raise ValueError(f"initial_states must be {wanted}, not {tuple(initial_states.shape)}")


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """One token of the recurrence, for generation; advances `state` [batch, nheads, head_dim, d_state] in place.

    x [batch, nheads, head_dim]; dt [batch, nheads]; A and dt_bias [nheads]; B and C [batch, ngroups, d_state]; D
    [nheads] or [nheads, head_dim]. Computes in the state's dtype and returns y like x. Not differentiable.
    """
    acc = state.dtype
    batch, nheads, head_dim, d_state = state.shape
    groups = B.shape[1]
    dt = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
    dt = F.softplus(dt) if dt_softplus else dt
    decay = (dt * A.to(acc)).exp_()
    wide = x.to(acc)
    state_g = state.view(batch, groups, nheads // groups, head_dim, d_state)
    state_g.mul_(decay.view(batch, groups, -1, 1, 1))
    step = (wide * dt.unsqueeze(-1)).view(batch, groups, -1, head_dim, 1)
    state_g.addcmul_(step, B.to(acc)[:, :, None, None, :])
    y = (state_g @ C.to(acc)[:, :, None, :, None]).view(batch, nheads, head_dim)
    if D is not None:
        y.addcmul_(wide, D.to(acc).view(nheads, -1))
    return y.to(x.dtype)
