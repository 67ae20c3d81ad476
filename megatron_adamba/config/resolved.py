"""Configs after `blueprint.resolve` has filled in what was left out, as types: the fields that then have a value."""

from __future__ import annotations

from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.root import AdambaConfig


class ResolvedModel(ModelConfig):
    """A ModelConfig with nothing left to derive: the same fields, and equal to a ModelConfig of the same values."""

    num_layers: int
    block_pattern: str
    """a letter a block"""
    vocab_size: int
    """still None while a command line is checked before its tokenizer is read"""
    num_heads: int
    num_kv_groups: int
    ffn_size: int
    expert_ffn_size: int
    """None in a model without experts"""
    static_norm_size: int
    mamba_num_heads: int
    """None in a model without Mamba-2 blocks"""
    widths: list[int]
    nest: list[NestRow]

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, ModelConfig) else NotImplemented


class ResolvedConfig(AdambaConfig):
    """The config of a run that has begun, whose model is resolved."""

    model: ResolvedModel
