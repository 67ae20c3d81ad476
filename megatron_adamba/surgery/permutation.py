"""One order of a model's channels and units: every tensor that such an axis touches takes part, so nothing changes at
full width."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_adamba.config.resolved import ResolvedModel

_BY_LEAF = {
    "q_weight": ("query", "hidden"),
    "k_weight": ("key", "hidden"),
    "v_weight": ("key", "hidden"),
    "q_bias": ("query",),
    "k_bias": ("key",),
    "v_bias": ("key",),
    "sinks": ("head",),
    "o_weight": ("hidden", "query"),
    "o_bias": ("hidden",),
    "up_weight": ("ffn", "hidden"),
    "gate_weight": ("ffn", "hidden"),
    "up_bias": ("ffn",),
    "gate_bias": ("ffn",),
    "down_weight": ("hidden", "ffn"),
    "down_bias": ("hidden",),
}


def axis_roles(name: str) -> tuple[str | None, ...]:
    """What each axis of a parameter counts: hidden | query | key | head | ffn | expert, None for anything else."""
    owner, leaf = name.rsplit(".", 1)
    if leaf == "gain":
        return (None,)
    if ".moe.experts" in owner:
        return ("expert", *_BY_LEAF[leaf])
    if owner.endswith("router"):
        return ("expert", "hidden") if leaf == "weight" else ("expert",)
    if ".mixer." in name:
        # channels inside a Mamba mixer keep their places, as all of them always run
        return {"in_proj": (None, "hidden"), "out_proj": ("hidden", None)}.get(owner.rsplit(".", 1)[-1], ())
    if owner.startswith("predictor.") or "_gate." in owner:
        return (None, "hidden") if name.endswith("up.weight") else ()
    if owner in ("embedding", "head"):
        return (None, "hidden")
    return ("hidden",) if leaf == "weight" else _BY_LEAF[leaf]


@dataclass(frozen=True)
class Order:
    """New place -> old place. An order that is left out keeps the places."""

    head_dim: int
    hidden: Tensor | None = None
    """[hidden_size]"""
    heads: dict[int, Tensor] = field(default_factory=dict)
    """block -> [kv_groups, heads of a group] old query heads; a group's are those of one old group"""
    ffn: dict[int, Tensor] = field(default_factory=dict)
    """block -> [rows], or [experts, rows] of old experts"""
    experts: dict[int, Tensor] = field(default_factory=dict)
    """block -> [experts]"""

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter, by its canonical name, in the new order."""
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        roles = axis_roles(name)
        for axis, role in enumerate(roles):
            if role == "ffn" and "expert" in roles:
                tensor = self._inside_experts(tensor, axis, self.ffn.get(block))
            elif role is not None and (order := self._along(role, block)) is not None:
                tensor = tensor.index_select(axis, order)
        if roles[:1] == ("expert",) and block in self.experts:
            tensor = tensor.index_select(0, self.experts[block])
        return tensor

    def _along(self, role: str, block: int) -> Tensor | None:
        if role == "hidden":
            return self.hidden
        if role == "ffn":
            return self.ffn.get(block)
        heads = self.heads.get(block)
        if heads is None or role == "expert":
            return None
        if role == "head":
            return heads.flatten()
        units = heads.flatten() if role == "query" else heads[:, 0] // heads.shape[1]
        return (units[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    @staticmethod
    def _inside_experts(tensor: Tensor, axis: int, order: Tensor | None) -> Tensor:
        if order is None:
            return tensor
        return torch.stack([part.index_select(axis - 1, own) for part, own in zip(tensor, order)])


def random_order(config: ResolvedModel, seed: int) -> Order:
    """Of everything that `Order` can move in a resolved config's model, at once."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = lambda size: torch.randperm(size, generator=generator)
    size = config.num_heads // config.num_kv_groups
    order = Order(config.head_dim, hidden=shuffled(config.hidden_size))
    for block, letter in enumerate(config.block_pattern):
        if letter in "TE":
            groups = [shuffled(size) + group * size for group in shuffled(config.num_kv_groups)]
            order.heads[block] = torch.stack(groups)
        if letter == "E":
            order.experts[block] = shuffled(config.num_experts)
            order.ffn[block] = torch.stack([shuffled(config.expert_ffn_size) for _ in range(config.num_experts)])
        elif letter == "T" or config.mamba_use_mlp:
            order.ffn[block] = shuffled(config.ffn_size)
    return order
