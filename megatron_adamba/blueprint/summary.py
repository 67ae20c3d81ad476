"""Parameters by component and FLOPs per width, from the manifest alone: no weights are built."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.blueprint.manifest import GROUPS, manifest
from megatron_adamba.blueprint.nest import largest_widths
from megatron_adamba.blueprint.phases import trains_in_phase
from megatron_adamba.blueprint.stages import Chunk, StagePlan, specs_held
from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.config.resolved import ResolvedModel


def summarize_stages(
    config: ResolvedModel, stages: StagePlan, seq_len: int, frozen: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Of each rank of a pipeline: {"rank", "blocks", "parameters", "training_flops"}, gains left out of the parameters,
    FLOPs per token at full width. frozen: names of parameters that do not train."""
    plan, specs, rows = largest_widths(config), manifest(config), []
    costs = training_costs(config, seq_len, frozen)
    for rank in range(stages.pp):
        chunks = stages.chunks_of(rank)
        held = specs_held(specs, chunks, config.tie_embeddings)
        blocks = sum(costs.blocks[index][plan[index]] for chunk in chunks for index in chunk.blocks)
        parts = [
            [*(["embedding"] if chunk.embedding else []), _numbers(chunk), *(["head"] if chunk.head else [])]
            for chunk in chunks
        ]
        rows.append(
            {
                "rank": rank,
                "blocks": " and ".join(", ".join(names) for names in parts),
                "parameters": sum(spec.numel for spec in held if spec.group != "gain"),
                "training_flops": blocks + (costs.head[-1] if any(chunk.head for chunk in chunks) else 0),
            }
        )
    return rows


def _numbers(chunk: Chunk) -> str:
    last = chunk.last - 1
    return f"{chunk.first}-{last}" if last > chunk.first else str(last)


def summarize(config: ResolvedModel, seq_len: int, frozen: Collection[str] = ()) -> dict[str, Any]:
    """Of a resolved config; FLOPs are per token at `seq_len`, those of training with `frozen` left as it is.

    {"blocks", "parameters": {group: n}, "total", "total_without_gains", "trained_in_phase_1",
    "widths": [{width, kv_groups, ffn, forward_flops, training_flops, share_of_full}]}.
    """
    specs = manifest(config)
    counts = {group: sum(spec.numel for spec in specs if spec.group == group) for group in GROUPS}
    counts = {group: count for group, count in counts.items() if count}
    full = forward_flops(config, tuple(largest_widths(config)), seq_len)
    costs = training_costs(config, seq_len, frozen)
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
                "training_flops": costs.of(plan),
                "share_of_full": flops / full,
            }
        )
    total = sum(counts.values())
    in_phase = sum(spec.numel for spec in specs if spec.group != "gain" and trains_in_phase(spec, 1))
    return {
        "blocks": config.block_pattern,
        "parameters": counts,
        "total": total,
        "total_without_gains": total - counts.get("gain", 0),
        "trained_in_phase_1": in_phase,
        "widths": widths,
    }
