"""Models of T blocks and of M blocks with nearly the same number of parameters, at growing lengths.

Two architectures, not two ways to compute one function, so no output is compared. Ours is M, the peer is T.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import PeakMemory, Row, in_subprocess, seconds
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.model.adamba import AdambaModel


def measure(quick: bool) -> list[Row]:
    """Forward + backward in bf16 at batch 1: throughput and peak memory of each length, a fresh process each."""
    hidden, lengths, repeats = (64, (32, 64), 2) if quick else (512, (512, 1024, 2048, 4096, 8192), 3)
    t_config, m_config = build_configs(hidden)
    counts = {name: _count(config) for name, config in (("M", m_config), ("T", t_config))}
    rows = [Row("parameters in the blocks, M and T", counts["M"] / 1e6, counts["T"] / 1e6, "M", None)]
    threads = torch.get_num_threads()
    for length in lengths:
        m_speed, m_peak = in_subprocess(speed_and_peak, m_config, length, repeats, threads)
        t_speed, t_peak = in_subprocess(speed_and_peak, t_config, length, repeats, threads)
        what = f"M over T, two models, not compared: {length} tokens"
        rows.append(Row(what, m_speed, t_speed, "tokens/s", m_speed / t_speed))
        rows.append(Row(f"{what}, peak memory", m_peak, t_peak, "MiB", t_peak / m_peak))
    return rows


def build_configs(hidden: int) -> tuple[ResolvedModel, ResolvedModel]:
    """T and M. A T block has 12 H^2 weights, an M block about 6 H^2: two M for each T."""
    small = hidden < 128
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "vocab_size": 256,
        "head_dim": 16 if small else 64,
        "mamba_head_dim": 16 if small else 64,
        "mamba_d_state": 16 if small else 64,
        "mamba_chunk_size": 16 if small else 128,
    }
    layers = 1 if small else 4
    return (
        resolve_model(ModelConfig(block_pattern="T" * layers, **shape)),
        resolve_model(ModelConfig(block_pattern="M" * (2 * layers), **shape)),
    )


def _count(config: ResolvedModel) -> int:
    return sum(spec.numel for spec in manifest(config) if spec.name.startswith("blocks."))


def speed_and_peak(config: ResolvedModel, length: int, repeats: int, threads: int) -> tuple[float, float]:
    """(tokens per second, MiB above what the process held before the model was built)."""
    torch.set_num_threads(threads)
    peak = PeakMemory()
    model = AdambaModel(config).initialize(0).to(torch.bfloat16)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 1, length), generator=torch.Generator().manual_seed(1))

    def once() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, labels).backward()

    once()
    times = [seconds(once) for _ in range(repeats)]
    return length / statistics.median(times), peak.added()
