"""What this machine gives and takes: the matmul rate behind model FLOPs utilisation, the peak of memory."""

from __future__ import annotations

import resource
import statistics
import time

import torch

_SLOW = 10e9
"""FLOP/s under which a processor has no instructions for a type, and larger products would take many seconds"""


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matmul on this rank, the median of a few; takes a fraction of a second."""
    if device.type != "cpu":
        return _rate(dtype, device, 8192, 5)
    small = _rate(dtype, device, 128, 3)
    return small if small < _SLOW else _rate(dtype, device, 1024, 5)


def _rate(dtype: torch.dtype, device: torch.device, size: int, repeats: int) -> float:
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have held on a GPU so far, or that this process has held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
