"""Where nanochat checkpoints keep our tensors: names in its own .pt files and in transformers' folders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One way of writing nanochat down."""

    title: str
    ends: dict[str, str]
    """canonical name -> theirs, of what lies outside the blocks"""
    block_prefix: str
    block: dict[str, str]
    """canonical name behind `blocks.N.` -> theirs behind the prefix"""
    padded_vocabulary: bool
    """tables may have more rows than the vocabulary has tokens"""

    def place(self, canonical: str) -> str:
        """Where the source keeps the tensor. KeyError for one that nanochat does not have."""
        if not canonical.startswith("blocks."):
            return self.ends[canonical]
        _, index, rest = canonical.split(".", 2)
        return self.block_prefix.format(index) + self.block[rest]


def _matrices(attention: str, output: str, up: str, down: str) -> dict[str, str]:
    """attention: name of q, k and v with a gap for the letter."""
    places = {f"attention.qkv.{letter}_weight": attention.format(letter) for letter in "qkv"}
    places |= {"attention.out.o_weight": output, "mlp.up.up_weight": up, "mlp.down.down_weight": down}
    return {ours: f"{theirs}.weight" for ours, theirs in places.items()}


OWN = Layout(
    "nanochat",
    {"embedding.weight": "transformer.wte.weight", "head.weight": "lm_head.weight"},
    "transformer.h.{}.",
    _matrices("attn.c_{}", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    padded_vocabulary=True,
)
TRANSFORMERS = Layout(
    "Hugging Face",
    {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"},
    "model.layers.{}.",
    _matrices("self_attn.{}_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2"),
    padded_vocabulary=False,
)

READS_NORM = {
    **{f"attention.qkv.{letter}_weight": "attention_norm" for letter in "qkv"},
    "mlp.up.up_weight": "mlp_norm",
}
"""canonical name of a matrix behind `blocks.N.` -> the norm whose output it multiplies"""


def norm_of(canonical: str) -> str | None:
    """Prefix of the norm whose output a matrix multiplies; None where that is no norm's."""
    if not canonical.startswith("blocks."):
        return "final_norm" if canonical == "head.weight" else None
    block, index, rest = canonical.split(".", 2)
    norm = READS_NORM.get(rest)
    return None if norm is None else f"{block}.{index}.{norm}"
