"""Mamba-1 and Mamba-2 mixers, always at full width, with a cache for generation.

Every parameter belongs to the module whose own forward reads it: a partitioned parameter is gathered around exactly
that module's forward. None is initialised here: `model/init.py` fills them by name, as each class says.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_adamba.layers.linear import Projection
from megatron_adamba.ops import dispatch
from megatron_adamba.ops.cpu_linear import linear
from megatron_adamba.ops.gated_norm import gated_rms_norm
from megatron_adamba.parallel.tensor import ALONE, TensorParallel


@dataclass
class MambaState:
    """What a mixer carries from token to token, in float32, batch first; mixers update it in place.

    conv_state [batch, channels, d_conv - 1], the last inputs of the convolution, oldest first.
    ssm_state [batch, nheads, head_dim, d_state] for Mamba-2, [batch, d_inner, d_state] for Mamba-1.
    """

    conv_state: Tensor
    ssm_state: Tensor


class _BiasedProjection(nn.Linear):
    """nn.Linear whose parameters stay as allocated until they are filled from outside."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class CausalConv1d(nn.Module):
    """Depthwise causal convolution and silu: weight [channels, d_conv], bias [channels]."""

    def __init__(self, channels: int, d_conv: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, d_conv, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cache: MambaState | None = None) -> Tensor:
        """x [batch, seq, channels] -> the same shape; with a cache, goes on from and updates its conv_state."""
        if cache is None:
            return dispatch.causal_conv1d(x, self.weight, self.bias, seq_idx)
        if x.shape[1] == 1:
            with torch.no_grad():
                return dispatch.causal_conv1d_step(x[:, 0], cache.conv_state, self.weight, self.bias).unsqueeze(1)
        y, final = dispatch.causal_conv1d(x, self.weight, self.bias, seq_idx, cache.conv_state, return_final_state=True)
        cache.conv_state.copy_(final.detach())
        return y


class GatedRMSNorm(nn.Module):
    """weight * rms_norm(x * silu(z)) over groups of `group_size` channels; weight [d_inner]."""

    def __init__(self, d_inner: int, group_size: int, eps: float, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, device=device, dtype=dtype))
        self.group_size, self.eps = group_size, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z [batch, seq, d_inner] -> [batch, seq, d_inner]."""
        return gated_rms_norm(x, z, self.weight, self.group_size, self.eps)


class Mamba2Mixer(nn.Module):
    """Mamba-2 (arXiv 2405.21060, section 7): project, convolve, scan, gate and normalise, project back.

    Parameters, with channels = d_inner + 2 * num_groups * d_state and d_inner = num_heads * head_dim:
      in_proj.weight [d_inner + channels + num_heads, hidden_size], rows in the order z, x, B, C, dt
      conv1d.weight [channels, d_conv], conv1d.bias [channels]
      A_log, D, dt_bias [num_heads]; A = -exp(A_log); all three are computed with in float32 whatever they are kept in
      norm.weight [d_inner]; groups of d_inner / num_groups channels
      out_proj.weight [hidden_size, d_inner]
    The initialisation that belongs to them: A uniform in [1, 16]; dt_bias the inverse softplus of a log-uniform dt in
    [1e-3, 1e-1]; D and norm.weight one; the projections and the convolution like any linear layer.

    num_heads defaults to expand * hidden_size / head_dim; a tensor-parallel rank passes its own num_heads, num_groups.
    x and the result have the form of the residual stream (`TensorParallel`); in between the sequence is whole.
    Raises ValueError where the sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        num_heads: int | None = None,
        num_groups: int = 1,
        chunk_size: int = 128,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        tp: TensorParallel = ALONE,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads is None:
            if expand * hidden_size % head_dim:
                raise ValueError(f"head_dim {head_dim} must divide expand * hidden_size = {expand * hidden_size}")
            num_heads = expand * hidden_size // head_dim
        if num_heads % num_groups:
            raise ValueError(f"num_groups {num_groups} must divide num_heads {num_heads}")
        self.hidden_size, self.d_state, self.d_conv, self.head_dim = hidden_size, d_state, d_conv, head_dim
        self.num_heads, self.num_groups, self.chunk_size = num_heads, num_groups, chunk_size
        self.d_inner = num_heads * head_dim
        self.tp = tp
        self.conv_channels = self.d_inner + 2 * num_groups * d_state
        kind = {"device": device, "dtype": dtype}
        self.in_proj = Projection(hidden_size, self.d_inner + self.conv_channels + num_heads, **kind)
        self.conv1d = CausalConv1d(self.conv_channels, d_conv, conv_bias, **kind)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **kind))
        self.A_log = nn.Parameter(torch.empty(num_heads, **kind))
        self.D = nn.Parameter(torch.empty(num_heads, **kind))
        self.norm = GatedRMSNorm(self.d_inner, self.d_inner // num_groups, norm_eps, **kind)
        self.out_proj = Projection(self.d_inner, hidden_size, **kind)

    def new_state(self, batch: int, device=None) -> MambaState:
        """A cache before the first token: zeros in float32."""
        return MambaState(
            torch.zeros(batch, self.conv_channels, self.d_conv - 1, device=device),
            torch.zeros(batch, self.num_heads, self.head_dim, self.d_state, device=device),
        )

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cache: MambaState | None = None) -> Tensor:
        """x [batch, seq, hidden_size] -> [batch, seq, hidden_size].

        seq_idx [batch, seq], never decreasing, numbers packed documents: nothing passes from one to the next. With a
        cache the sequence goes on where the cache stands, and the cache moves on; no gradient flows through it.
        """
        z, xBC, dt = self.in_proj(x, self.tp.exchange).split([self.d_inner, self.conv_channels, self.num_heads], dim=-1)
        y = self._mix(xBC, dt, seq_idx, cache)
        return self.tp.reduce_output(self.out_proj(self.norm(y, z)))

    def decode(self, x: Tensor, cache: MambaState, kept: Tensor | None) -> Tensor:
        """Move the cache on by x [batch, seq, hidden_size]; results of the tokens kept alone, [kept, hidden_size].

        kept: [kept] int64 places among all batch * seq tokens, None for all of them. No gradients.
        """
        xBC, dt = self.in_proj.some(x, slice(self.d_inner, None)).split([self.conv_channels, self.num_heads], dim=-1)
        y, x = _kept(self._mix(xBC, dt, None, cache), x, kept)
        return self.out_proj(self.norm(y, self.in_proj.some(x, slice(0, self.d_inner))))[0]

    def _mix(self, xBC: Tensor, dt: Tensor, seq_idx: Tensor | None, cache: MambaState | None) -> Tensor:
        """xBC [batch, seq, channels], dt [batch, seq, num_heads] -> [batch, seq, d_inner]."""
        xBC = self.conv1d(xBC, seq_idx, cache)
        bc = self.num_groups * self.d_state
        u, B, C = xBC.split([self.d_inner, bc, bc], dim=-1)
        u = u.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.num_groups, self.d_state)) for t in (B, C))
        return self._scan(u, dt, B, C, seq_idx, cache).flatten(2)

    def _scan(self, u, dt, B, C, seq_idx, cache) -> Tensor:
        A = -self.A_log.float().exp()
        if cache is None:
            return dispatch.ssd_scan(u, dt, A, B, C, self.chunk_size, D=self.D, dt_bias=self.dt_bias, seq_idx=seq_idx)
        state = cache.ssm_state
        if u.shape[1] == 1:
            with torch.no_grad():
                u, dt, B, C = (t[:, 0] for t in (u, dt, B, C))
                return dispatch.ssd_step(state, u, dt, A, B, C, self.D, self.dt_bias).unsqueeze(1)
        y, final = dispatch.ssd_scan(
            u, dt, A, B, C, self.chunk_size, D=self.D, dt_bias=self.dt_bias, initial_states=state,
            seq_idx=seq_idx, return_final_states=True,
        )  # fmt: skip
        state.copy_(final.detach())
        return y


class Mamba1Mixer(nn.Module):
    """Mamba-1 (arXiv 2312.00752, section 3.4): project, convolve, select dt, B and C, scan, gate, project back.

    Parameters, with d_inner = expand * hidden_size:
      in_proj.weight [2 * d_inner, hidden_size], rows in the order x, z
      conv1d.weight [d_inner, d_conv], conv1d.bias [d_inner]
      x_proj.weight [dt_rank + 2 * d_state, d_inner], rows in the order dt, B, C
      dt_proj.weight [d_inner, dt_rank], dt_proj.bias [d_inner], which the scan adds in float32
      A_log [d_inner, d_state], D [d_inner]; computed with in float32 whatever they are kept in
      out_proj.weight [hidden_size, d_inner]
    The initialisation that belongs to them: A_log = log(1..d_state) in every row; D one; dt_proj.bias the inverse
    softplus of a log-uniform dt in [1e-3, 1e-1]; dt_proj.weight uniform within dt_rank^-0.5; the rest like any linear
    layer.

    dt_rank defaults to ceil(hidden_size / 16); a tensor-parallel rank passes its own d_inner, and its
    parts of dt, B and C are summed over the ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        d_inner: int | None = None,
        conv_bias: bool = True,
        tp: TensorParallel = ALONE,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.hidden_size, self.d_state, self.d_conv = hidden_size, d_state, d_conv
        self.d_inner = expand * hidden_size if d_inner is None else d_inner
        self.tp = tp
        self.dt_rank = -(-hidden_size // 16) if dt_rank is None else dt_rank
        kind = {"device": device, "dtype": dtype}
        self.in_proj = Projection(hidden_size, 2 * self.d_inner, **kind)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, conv_bias, **kind)
        self.x_proj = Projection(self.d_inner, self.dt_rank + 2 * d_state, **kind)
        self.dt_proj = _BiasedProjection(self.dt_rank, self.d_inner, bias=True, **kind)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **kind))
        self.D = nn.Parameter(torch.empty(self.d_inner, **kind))
        self.out_proj = Projection(self.d_inner, hidden_size, **kind)

    def new_state(self, batch: int, device=None) -> MambaState:
        """A cache before the first token: zeros in float32."""
        return MambaState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, device=device),
            torch.zeros(batch, self.d_inner, self.d_state, device=device),
        )

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cache: MambaState | None = None) -> Tensor:
        """Like `Mamba2Mixer.forward`."""
        u, z = self.in_proj(x, self.tp.exchange).chunk(2, dim=-1)
        return self.tp.reduce_output(self.out_proj(self._mix(u, z, seq_idx, cache)))

    def decode(self, x: Tensor, cache: MambaState, kept: Tensor | None) -> Tensor:
        """Like `Mamba2Mixer.decode`."""
        y, x = _kept(self._mix(self.in_proj.some(x, slice(0, self.d_inner)), None, None, cache), x, kept)
        return self.out_proj(y * nn.functional.silu(self.in_proj.some(x, slice(self.d_inner, None))))[0]

    def _mix(self, u: Tensor, z: Tensor | None, seq_idx: Tensor | None, cache: MambaState | None) -> Tensor:
        """u, z [batch, seq, d_inner] -> the same shape; without z the result is not gated."""
        u = self.conv1d(u, seq_idx, cache)
        dt, B, C = self.tp.reduce_shared(self.x_proj(u)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return self._scan(u, self.dt_proj(dt), B, C, z, seq_idx, cache)

    def _scan(self, u, delta, B, C, z, seq_idx, cache) -> Tensor:
        A = -self.A_log.float().exp()
        if cache is None:
            return dispatch.selective_scan(u, delta, A, B, C, D=self.D, z=z, seq_idx=seq_idx)
        state = cache.ssm_state
        if u.shape[1] == 1:
            with torch.no_grad():
                u, delta, B, C = (t[:, 0] for t in (u, delta, B, C))
                y = dispatch.selective_scan_step(state, u, delta, A, B, C, D=self.D).unsqueeze(1)
            return y if z is None else y * nn.functional.silu(z)
        y, final = dispatch.selective_scan(
            u, delta, A, B, C, D=self.D, z=z, initial_states=state, seq_idx=seq_idx, return_final_states=True
        )
        state.copy_(final.detach())
        return y


def _kept(y: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """[batch, seq, ...] each to [1, kept, ...]."""
    y, x = y.flatten(0, 1), x.flatten(0, 1)
    return (y[None], x[None]) if kept is None else (y[kept][None], x[kept][None])
