"""The matmul rate that model FLOPs utilisation is measured against."""

from __future__ import annotations

import statistics
import time

import torch


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a square matmul on this rank, the median of a few; takes a fraction of a second."""
    size = size if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
