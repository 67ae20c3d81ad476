"""How much each channel and unit of a model says on real tokens, read off its activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.layers.moe.experts import Experts
from megatron_adamba.layers.moe.layer import MoE
from megatron_adamba.layers.norm import NestedNorm
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.activation import clamped_swiglu


@dataclass
class Importance:
    """Sums over tokens in fp32, of which only the order counts."""

    hidden: Tensor
    """[hidden_size] |output| of every norm, each over its mean"""
    heads: dict[int, Tensor] = field(default_factory=dict)
    """block -> [kv_groups, heads of a group] squares of what the output projection reads"""
    ffn: dict[int, Tensor] = field(default_factory=dict)
    """block -> [rows] or [experts, rows] squares of what the down projection reads"""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """block -> [experts] routing weight times the norm of the output"""


def measure(model: AdambaModel, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Importance:
    """At full width. batches: tokens and document numbers, [batch, seq] each."""
    sums: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros(()))
    handles = [hook for name, module in model.named_modules() for hook in _watch(name, module, sums)]
    try:
        with torch.no_grad():
            for tokens, seq_idx in batches:
                model.hidden_states(tokens, seq_idx, full_plan(model.config))
    finally:
        for handle in handles:
            handle.remove()
    return _collected(model, sums)


def _watch(name: str, module: nn.Module, sums: dict[tuple, Tensor]) -> list:
    """Hooks that only look."""
    block = int(name.split(".")[1]) if name.startswith("blocks.") else -1

    def add(kind: str, values: Tensor) -> None:
        sums[kind, block, name] = sums[kind, block, name] + values.float().flatten(0, -2).sum(0)

    if isinstance(module, NestedNorm):
        return [module.register_forward_hook(lambda _, __, out: add("norm", out.abs()))]
    if name.endswith("attention.out"):
        return [module.register_forward_pre_hook(lambda _, given: add("heads", given[0].square()))]
    if name.endswith("mlp.down"):
        return [module.register_forward_pre_hook(lambda _, given: add("ffn", given[0].square()))]
    if isinstance(module, MoE):
        return [module.experts.register_forward_hook(lambda experts, given, out: _experts(experts, given, out, add))]
    return []


def _experts(experts: Experts, given: tuple, out: Tensor, add) -> None:
    """given: x [n, w] by expert, weights [n], counts [experts]; out: [n, w], weighted."""
    x, _, counts = given[:3]
    sizes = counts.tolist()
    rows, norms = [], []
    for expert, (own, came) in enumerate(zip(x.split(sizes), out.split(sizes))):
        gate = own @ experts.gate_weight[expert].t() + experts.gate_bias[expert]
        up = own @ experts.up_weight[expert].t() + experts.up_bias[expert]
        rows.append(clamped_swiglu(gate, up, experts.limit, experts.slope).square().sum(0))
        norms.append(torch.linalg.vector_norm(came, dim=-1).sum())
    add("ffn", torch.stack(rows)[None].flatten(1))
    add("experts", torch.stack(norms)[None])


def _collected(model: AdambaModel, sums: dict[tuple, Tensor]) -> Importance:
    config = model.config
    result = Importance(torch.zeros(config.hidden_size))
    for (kind, block, _), total in sums.items():
        if kind == "norm":
            # of its own mean, so that no norm's gain outweighs the others
            result.hidden += total / total.mean().clamp(min=torch.finfo(torch.float32).tiny)
        elif kind == "heads":
            result.heads[block] = total.view(config.num_kv_groups, -1, config.head_dim).sum(-1)
        elif kind == "ffn":
            result.ffn[block] = total.view(config.num_experts, -1) if config.block_pattern[block] == "E" else total
        else:
            result.experts[block] = total
    return result
