"""How the plain PyTorch kernels cut long tensors, and the dtype they accumulate in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequence_blocks(seq: int, elements_per_position: int, device: torch.device) -> list[slice]:
    """Cuts range(seq) into slices whose workspaces fit the cache; no slice for an empty sequence."""
    # A float32 workspace of 1 MiB stays in a core's cache; on a GPU fewer launches matter more.
    budget = 1 << 18 if device.type == "cpu" else 1 << 26
    length = max(1, budget // max(1, elements_per_position))
    return [slice(start, min(start + length, seq)) for start in range(0, seq, length)]
