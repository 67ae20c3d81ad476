"""Which tensor-parallel degrees a model can be cut into."""

from __future__ import annotations

from math import gcd

from megatron_adamba.blueprint.manifest import vocab_unit
from megatron_adamba.blueprint.nest import block_config
from megatron_adamba.blueprint.resolve import mamba_inner_size
from megatron_adamba.config.resolved import ResolvedModel


def _blocks(config: ResolvedModel, letters: str) -> list[ResolvedModel]:
    """The config as each block of these letters sees it."""
    return [block_config(config, index) for index, letter in enumerate(config.block_pattern) if letter in letters]


def divided_sizes(config: ResolvedModel) -> dict[str, int]:
    """What a degree has to divide, by the flag that sets it: KV groups, Mamba-2's groups, Mamba-1's inner channels."""
    sizes = {}
    if attention := _blocks(config, "TE"):
        # what divides each block's number divides this, and the other way round
        sizes["--model.num_kv_groups"] = gcd(*(block.num_kv_groups for block in attention))
    if "M" in config.block_pattern and config.mamba_version == 2:
        sizes["--model.mamba_num_groups"] = config.mamba_num_groups
    elif "M" in config.block_pattern:
        sizes["--model.mamba_expand"] = mamba_inner_size(config)
    return sizes


def shared_units(config: ResolvedModel) -> dict[str, int]:
    """What is dealt out in units without having to be divided; every rank needs one unit at full width."""
    units = {}
    if mlps := _blocks(config, "TM" if config.mamba_use_mlp else "T"):
        units["--model.ffn_granule"] = min(block.ffn_size for block in mlps) // config.ffn_granule
    if config.vocab_size is not None:
        units["--model.vocab_size"] = -(-config.vocab_size // vocab_unit(config.vocab_size))
    return units


def legal_tp_degrees(config: ResolvedModel) -> list[int]:
    """Of a resolved config, ascending; 1 is always among them."""
    common = gcd(*divided_sizes(config).values())
    most = min([common, *shared_units(config).values()])
    return [degree for degree in range(1, most + 1) if common % degree == 0]


def obstacle(config: ResolvedModel, tp: int) -> str | None:
    """The flag that keeps a model from being cut into `tp`, with its size; None where it can be cut."""
    for flag, size in divided_sizes(config).items():
        if size % tp:
            return f"does not divide {flag} ({size})"
    for flag, units in shared_units(config).items():
        if units < tp:
            return f"leaves ranks without a unit of {flag} ({units} units)"
    return None
