"""Whether a machine computes in bf16 at all, or torch does it number by number."""

from __future__ import annotations

import torch


def fast_bf16(device: torch.device | None = None) -> bool:
    """On a CPU: whether oneDNN has bf16 products for it. Without them (AVX2, the first AVX-512) a product takes some 50
    times as long as in fp32. device: None is the GPU where there is one."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())
