"""Parameters by component and FLOPs per width, from the manifest alone: no weights are built."""

from __future__ import annotations

from typing import Any

from megatron_adamba.blueprint.flops import forward_flops, training_flops
from megatron_adamba.blueprint.manifest import GROUPS, manifest
from megatron_adamba.config.model import ModelConfig


def summarize(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """{"parameters": {group: n}, "total", "total_without_gains", "widths": [{width, kv_groups, ffn, active_share,
    forward_flops, training_flops}]} of a resolved config; FLOPs are per token at `seq_len`."""
    specs = manifest(config)
    counts = {group: sum(spec.numel for spec in specs if spec.group == group) for group in GROUPS}
    counts = {group: count for group, count in counts.items() if count}
    full = forward_flops(config, (config.hidden_size,) * config.num_layers, seq_len)
    widths = []
    for row in config.nest:
        plan = (row.width,) * config.num_layers
        flops = forward_flops(config, plan, seq_len)
        widths.append(
            {
                "width": row.width,
                "kv_groups": row.kv_groups,
                "ffn": row.ffn,
                "forward_flops": flops,
                "training_flops": training_flops(config, plan, seq_len),
                "share_of_full": flops / full,
            }
        )
    total = sum(counts.values())
    return {
        "blocks": config.block_pattern,
        "parameters": counts,
        "total": total,
        "total_without_gains": total - counts.get("gain", 0),
        "widths": widths,
    }
