"""Depthwise causal convolution over [batch, seq, channels], as Mamba puts it in front of its scan.

With a window of `width` tokens and weight[c, width - 1] on the token itself:

    y[b, t, c] = act(bias[c] + sum_k weight[c, k] * x[b, t - (width - 1) + k, c])

Shifted multiply-adds over blocks of the sequence that fit the cache: a library convolution with one group per channel
needs another layout and, in bfloat16 on a CPU, far more time. Accumulates in float32 and recomputes the
pre-activation in backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adamba.ops.blocks import accumulation_dtype, sequence_blocks


class _Window:
    """Views of x shifted back by 0 to width - 1 tokens, block by block, zero across document boundaries."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, state: Tensor | None):
        self.x, self.seq_idx = x, seq_idx
        self.acc = accumulation_dtype(x.dtype)
        self.batch, self.seq, self.channels = x.shape
        self.width = weight.shape[1]
        # [width, channels], the token's own tap first: taps[i] goes with the token i places back.
        self.taps = weight.to(self.acc).t().flip(0).contiguous()
        self.bias = None if bias is None else bias.to(self.acc)
        halo = (self.batch, self.width - 1, self.channels)
        # [batch, width - 1, channels]: what lies before the first token.
        self.before = x.new_zeros(halo) if state is None else state.to(x.dtype).transpose(1, 2)
        self.blocks = sequence_blocks(self.seq, self.batch * self.channels, x.device)

    def load(self, span: slice) -> Tensor:
        """The block and the width - 1 tokens before it, [batch, width - 1 + block, channels], accumulation dtype."""
        first = span.start - (self.width - 1)
        if first >= 0:
            return self.x[:, first : span.stop].to(self.acc)
        return torch.cat([self.before[:, span.start :], self.x[:, : span.stop]], dim=1).to(self.acc)

    def same_document(self, span: slice, back: int) -> Tensor | None:
        """[batch, block, 1], 1 where the token `back` places before is of the same document; None where all are."""
        if self.seq_idx is None or back == 0:
            return None
        # What lies before the first token belongs to the first document.
        idx = self.seq_idx
        position = torch.arange(span.start - back, span.stop - back, device=idx.device).clamp_(min=0)
        return (idx[:, span] == idx[:, position]).to(self.acc).unsqueeze(-1)

    def shifted(self, loaded: Tensor, span: slice, back: int) -> Tensor:
        """x[t - back] for every t of the block, from what `load` returned: [batch, block, channels]."""
        start = self.width - 1 - back
        view = loaded[:, start : start + span.stop - span.start]
        same = self.same_document(span, back)
        return view if same is None else view * same

    def pre_activation(self, loaded: Tensor, span: slice) -> Tensor:
        own = self.shifted(loaded, span, 0)
        out = own * self.taps[0] if self.bias is None else torch.addcmul(self.bias, own, self.taps[0])
        for back in range(1, self.width):
            out.addcmul_(self.shifted(loaded, span, back), self.taps[back])
        return out


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx, initial_state, silu):
        window = _Window(x, weight, bias, seq_idx, initial_state)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for span in window.blocks:
            out = window.pre_activation(window.load(span), span)
            y[:, span] = F.silu(out, inplace=True) if silu else out
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_state)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, seq_idx, initial_state = ctx.saved_tensors
        w = _Window(x, weight, bias, seq_idx, initial_state)
        halo = w.width - 1
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_taps = torch.zeros_like(w.taps)
        d_bias = torch.zeros(w.channels, dtype=w.acc, device=x.device)
        # d of the last width - 1 tokens before the block just done, as far as later tokens ask for it.
        owed = torch.zeros((w.batch, halo, w.channels), dtype=w.acc, device=x.device)
        for span in reversed(w.blocks):
            length = span.stop - span.start
            loaded = w.load(span)
            d_pre = dy[:, span].to(w.acc)
            if ctx.silu:
                d_pre = torch.ops.aten.silu_backward(d_pre, w.pre_activation(loaded, span))
            d_bias += d_pre.sum(dim=(0, 1))
            d_loaded = torch.zeros_like(loaded)
            d_loaded[:, length:] = owed
            for back in range(w.width):
                same = w.same_document(span, back)
                masked = d_pre if same is None else d_pre * same
                start = halo - back
                d_loaded[:, start : start + length].addcmul_(masked, w.taps[back])
                d_taps[back] += (masked * loaded[:, start : start + length]).sum(dim=(0, 1))
            dx[:, span] = d_loaded[:, halo:]
            owed = d_loaded[:, :halo]
        return (
            dx,
            d_taps.flip(0).t().to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None if initial_state is None else owed.transpose(1, 2).to(initial_state.dtype),
            None,
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = True,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with its own causal window (Mamba, arXiv 2312.00752, section 3.4).

    x [batch, seq, channels], any strides, any seq, also 0; weight [channels, width]; bias [channels]; initial_state
    [batch, channels, width - 1], the inputs before the first token, oldest first (zeros if not given). seq_idx,
    [batch, seq], never decreasing, numbers packed documents: a window stops at its own document's start, and
    initial_state belongs to the first. With `silu`, y is silu of the sum.

    Returns y, contiguous, in x's dtype; with `return_final_state` also the state to go on with, [batch, channels,
    width - 1] in x's dtype, with zeros where an input is of another document than the last token.
    Raises ValueError where shapes do not fit.
    """
    check_conv_inputs(x, weight, bias, seq_idx, initial_state)
    y = _CausalConv.apply(x, weight, bias, seq_idx, initial_state, silu)
    if not return_final_state:
        return y
    return y, final_conv_state(x, weight.shape[1], seq_idx, initial_state)


def final_conv_state(x: Tensor, width: int, seq_idx: Tensor | None, initial_state: Tensor | None) -> Tensor:
    """The last width - 1 inputs, [batch, channels, width - 1], those of earlier documents zero; differentiable."""
    keep = width - 1
    batch, seq, channels = x.shape
    before = max(0, keep - seq)
    tail = x[:, seq - (keep - before) :]
    if seq_idx is not None and seq:
        same = seq_idx[:, seq - (keep - before) :] == seq_idx[:, -1:]
        tail = tail * same.unsqueeze(-1)
    if before:
        if initial_state is None:
            older = x.new_zeros(batch, before, channels)
        else:
            older = initial_state[:, :, keep - before :].transpose(1, 2).to(x.dtype)
            if seq_idx is not None and seq:
                older = older * (seq_idx[:, :1] == seq_idx[:, -1:]).unsqueeze(-1)
        tail = torch.cat([older, tail], dim=1)
    return tail.transpose(1, 2)


def check_conv_inputs(x, weight, bias=None, seq_idx=None, initial_state=None) -> None:
    """Raises ValueError unless the shapes are those that `causal_conv1d` documents."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"causal_conv1d needs x [batch, seq, channels] and weight [channels, width], "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    batch, seq, channels = x.shape
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be {(channels,)}, not {tuple(bias.shape)}")
    if seq_idx is not None and seq_idx.shape != (batch, seq):
        raise ValueError(f"seq_idx must be {(batch, seq)}, not {tuple(seq_idx.shape)}")
    wanted = (batch, channels, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != wanted:
        raise ValueError(f"initial_state must be {wanted}, not {tuple(initial_state.shape)}")


def causal_conv1d_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> Tensor:
    """One token: x [batch, channels] -> y [batch, channels] in x's dtype; shifts `conv_state` in place.

    conv_state [batch, channels, width - 1] holds the inputs before this one, oldest first. Computes in the state's
    dtype. Not differentiable.
    """
    window = torch.cat([conv_state, x.to(conv_state.dtype).unsqueeze(-1)], dim=-1)
    y = (window * weight.to(conv_state.dtype)).sum(dim=-1)
    if bias is not None:
        y += bias.to(y.dtype)
    conv_state.copy_(window[..., 1:])
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)
