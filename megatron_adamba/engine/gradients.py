"""Where each of DeepSpeed's optimizers keeps the reduced gradients of this rank, right before its step."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_tensors(engine) -> list[Tensor]:
    """This rank's share of the summed gradients (all of them where they are not partitioned).

    Read from attributes of DeepSpeed 0.19.8: BF16_Optimizer (ZeRO 1 with bf16 weights and fp32 sums), stage 1 and 2,
    stage 3, each with and without offload; plain `.grad` at stage 0.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return list(optimizer.fp32_groups_gradients_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        if optimizer.cpu_offload:
            return _present(group.grad for group in optimizer.single_partition_of_fp32_groups)
        return _present(grad for grads in optimizer.averaged_gradients.values() for grad in grads or [])
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if optimizer.offload_optimizer:
            return _present(group.grad for group in optimizer.fp32_partitioned_groups_flat)
        return _present(grad for grads in optimizer.averaged_gradients.values() for grad in grads or [])
    return _present(p.grad for p in engine.module.parameters())


def _present(grads) -> list[Tensor]:
    return [grad for grad in grads if grad is not None and grad.numel()]


def all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """A bool scalar on `device`: no inf and no nan anywhere. No host sync."""
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    norms = torch.stack([norm.float().to(device) for norm in torch._foreach_norm(tensors)])
    return torch.isfinite(norms).all()
