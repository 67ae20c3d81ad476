"""The Mamba-2 mixer beside `transformers`' on its torch path: forward + backward, speed and peak memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_adamba.commands.benchmarks.common import (
    DTYPES,
    TOLERANCE,
    PeakMemory,
    Row,
    gradient_of,
    in_subprocess,
    interleaved,
    require_close,
    time_row,
)
from megatron_adamba.layers.mamba import Mamba2Mixer
from megatron_adamba.ops.host_memory import keep_freed_pages

PLACES = {name: name for name in ("A_log", "D", "dt_bias", "in_proj.weight", "norm.weight", "out_proj.weight")}
PLACES |= {"conv1d.weight": "conv1d.weight", "conv1d.bias": "conv1d.bias"}
"""our parameters and where transformers keeps them"""
EPS = 1e-5
OUR_CHUNK = 128
PEER_CHUNKS = (256, 128)
"""transformers' default, and the size that suits it best here"""


def measure(quick: bool) -> list[Row]:
    """Two speed rows and a memory row for every dtype, state size and chunk of the peer's."""
    hidden, batch, seq, repeats = (64, 2, 32, 2) if quick else (1024, 2, 1024, 5)
    rows = []
    for dtype in DTYPES:
        for d_state in (16,) if quick else (128, 64):
            for peer_chunk in PEER_CHUNKS[:1] if quick else PEER_CHUNKS:
                size = (hidden, batch, seq, d_state, dtype, peer_chunk)
                what = f"{dtype} d_state {d_state}, peer's chunk {peer_chunk}"
                threads = torch.get_num_threads()
                rows.append(_speed(*size, repeats, what))
                rows.append(in_subprocess(speed_with_pages_kept, *size, repeats, what, threads))
                ours, peer = (in_subprocess(peak_of, side, *size, threads) for side in ("ours", "peer"))
                rows.append(Row(f"{what}, peak memory", ours, peer, "MiB", peer / ours))
    return rows


def build(hidden: int, d_state: int, dtype: str, seq: int, peer_chunk: int) -> tuple[Mamba2Mixer, nn.Module]:
    """Both mixers with the same weights."""
    from transformers import Mamba2Config, logging
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as PeerMixer

    # it would say four times that its fused kernels are not there
    logging.set_verbosity_error()
    head_dim = 64 if hidden >= 128 else 16
    config = Mamba2Config(
        hidden_size=hidden,
        state_size=d_state,
        num_heads=2 * hidden // head_dim,
        head_dim=head_dim,
        n_groups=1,
        chunk_size=min(peer_chunk, seq),
        expand=2,
        time_step_limit=(0.0, float("inf")),
        vocab_size=8,
        num_hidden_layers=1,
        layer_norm_epsilon=EPS,
    )
    peer = PeerMixer(config, layer_idx=0)
    ours = Mamba2Mixer(hidden, d_state=d_state, head_dim=head_dim, chunk_size=min(OUR_CHUNK, seq), norm_eps=EPS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            fill(name, parameter, generator)
            peer.get_parameter(PLACES[name]).copy_(parameter.view_as(peer.get_parameter(PLACES[name])))
    return ours.to(DTYPES[dtype]), peer.to(DTYPES[dtype])


def fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Values in the range of a trained model's; `generator` makes them the same every time."""
    noise = torch.randn(parameter.shape, generator=generator)
    if name == "A_log":
        parameter.copy_((1 + 15 * noise.sigmoid()).log())
    elif name == "dt_bias":
        parameter.copy_(noise - 4)
    elif name in ("D", "norm.weight"):
        parameter.copy_(1 + 0.1 * noise)
    else:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def once(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward + backward; returns the output and the gradient of the input."""
    mixer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = mixer(x)
    y.backward(torch.ones_like(y))
    return y.detach(), gradient_of(x)


def _input(hidden: int, batch: int, seq: int, dtype: str) -> Tensor:
    return torch.randn(batch, seq, hidden, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])


def _speed(
    hidden: int, batch: int, seq: int, d_state: int, dtype: str, peer_chunk: int, repeats: int, what: str
) -> Row:
    ours, peer = build(hidden, d_state, dtype, seq, peer_chunk)
    x = _input(hidden, batch, seq, dtype)
    for part, mine, theirs in zip(("output", "input gradient"), once(ours, x), once(peer, x)):
        require_close(f"{what}, {part}", mine, theirs, TOLERANCE[DTYPES[dtype]])
    times = interleaved({"ours": lambda: once(ours, x), "peer": lambda: once(peer, x)}, repeats, warmup=1)
    return time_row(f"{what}, forward + backward", times["ours"], times["peer"])


def speed_with_pages_kept(
    hidden: int, batch: int, seq: int, d_state: int, dtype: str, peer_chunk: int, repeats: int, what: str, threads: int
) -> Row:
    """Like `_speed`, in a process whose allocator keeps what is freed, as our training script has it: who asks for more
    memory gains more by that."""
    torch.set_num_threads(threads)
    keep_freed_pages()
    return _speed(hidden, batch, seq, d_state, dtype, peer_chunk, repeats, f"{what}, freed pages kept")


def peak_of(
    side: str, hidden: int, batch: int, seq: int, d_state: int, dtype: str, peer_chunk: int, threads: int
) -> float:
    """MiB that two passes of one side add to a process in which both mixers are built."""
    torch.set_num_threads(threads)
    ours, peer = build(hidden, d_state, dtype, seq, peer_chunk)
    x = _input(hidden, batch, seq, dtype)
    peak = PeakMemory()
    for _ in range(2):
        once(ours if side == "ours" else peer, x)
    return peak.added()
