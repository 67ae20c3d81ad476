"""Where GPT-OSS checkpoints keep our tensors: names and shapes of OpenAI's layout and of transformers'."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.surgery.gpt_oss_config import HUGGING_FACE, OPENAI


@dataclass(frozen=True)
class Place:
    """A tensor of the source, or a part of one."""

    name: str
    part: str = "all"
    """all | q, k, v: rows of a fused matrix | gate, up: even and odd rows"""
    expert_matrix: bool = False
    """a matrix an expert: it may be MXFP4, and transformers' 16-bit ones are transposed"""


@dataclass(frozen=True)
class Layout:
    """One way of writing GPT-OSS down."""

    title: str
    ends: dict[str, str]
    """canonical name -> theirs, of what lies outside the blocks"""
    block_prefix: str
    block: dict[str, Place]
    """canonical name behind `blocks.N.` -> place behind the prefix"""
    blocks_suffix: str
    scales_suffix: str
    """of MXFP4 tensors"""
    transposed: bool
    """expert matrices that are not MXFP4 are [experts, inputs, outputs]"""

    def place(self, canonical: str) -> Place:
        """Where the source keeps the tensor. KeyError for one that GPT-OSS does not have."""
        if not canonical.startswith("blocks."):
            return Place(self.ends[canonical])
        _, index, rest = canonical.split(".", 2)
        place = self.block[rest]
        return Place(self.block_prefix.format(index) + place.name, place.part, place.expert_matrix)


_EXPERT_PARTS = {"gate": "gate", "up": "up", "down": "all"}


def _expert_places(names: dict[str, tuple[str, str]]) -> dict[str, Place]:
    """names: gate, up, down -> (matrix, bias)."""
    places = {}
    for ours, (matrix, bias) in names.items():
        places[f"moe.experts.{ours}_weight"] = Place(matrix, _EXPERT_PARTS[ours], expert_matrix=True)
        places[f"moe.experts.{ours}_bias"] = Place(bias, _EXPERT_PARTS[ours])
    return places


def _hugging_face_block() -> dict[str, Place]:
    places = {
        "attention_norm.weight": Place("input_layernorm.weight"),
        "attention.sinks": Place("self_attn.sinks"),
        "moe_norm.weight": Place("post_attention_layernorm.weight"),
    }
    for kind in ("weight", "bias"):
        places[f"moe.router.{kind}"] = Place(f"mlp.router.{kind}")
        for name, owner in (("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("o", "out")):
            places[f"attention.{owner}.{name}_{kind}"] = Place(f"self_attn.{name}_proj.{kind}")
    fused = ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias")
    down = ("mlp.experts.down_proj", "mlp.experts.down_proj_bias")
    return places | _expert_places({"gate": fused, "up": fused, "down": down})


def _openai_block() -> dict[str, Place]:
    places = {
        "attention_norm.weight": Place("attn.norm.scale"),
        "attention.sinks": Place("attn.sinks"),
        "moe_norm.weight": Place("mlp.norm.scale"),
    }
    for kind in ("weight", "bias"):
        places[f"moe.router.{kind}"] = Place(f"mlp.gate.{kind}")
        places[f"attention.out.o_{kind}"] = Place(f"attn.out.{kind}")
        for name in "qkv":
            places[f"attention.qkv.{name}_{kind}"] = Place(f"attn.qkv.{kind}", part=name)
    fused, down = ("mlp.mlp1_weight", "mlp.mlp1_bias"), ("mlp.mlp2_weight", "mlp.mlp2_bias")
    return places | _expert_places({"gate": fused, "up": fused, "down": down})


LAYOUTS = {
    HUGGING_FACE: Layout(
        HUGGING_FACE,
        {
            "embedding.weight": "model.embed_tokens.weight",
            "final_norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        },
        "model.layers.{}.",
        _hugging_face_block(),
        "_blocks",
        "_scales",
        transposed=True,
    ),
    OPENAI: Layout(
        OPENAI,
        {
            "embedding.weight": "embedding.weight",
            "final_norm.weight": "norm.scale",
            "head.weight": "unembedding.weight",
        },
        "block.{}.",
        _openai_block(),
        ".blocks",
        ".scales",
        transposed=False,
    ),
}


def fused_rows(config: ResolvedModel, part: str) -> tuple[int, int]:
    """First row and the row behind the last of q, k or v in OpenAI's fused matrix."""
    query, key = config.num_heads * config.head_dim, config.num_kv_groups * config.head_dim
    starts = {"q": (0, query), "k": (query, query + key), "v": (query + key, query + 2 * key)}
    return starts[part]


def source_shape(config: ResolvedModel, spec: ParamSpec, place: Place, transposed: bool) -> tuple[int, ...]:
    """Shape of the whole source tensor that holds `spec`, where it is not MXFP4."""
    shape = list(spec.shape)
    if place.part in ("q", "k", "v"):
        shape[0] = fused_rows(config, "v")[1]
    elif place.part in ("gate", "up"):
        shape[1] *= 2
    if place.expert_matrix and transposed:
        shape[1], shape[2] = shape[2], shape[1]
    return tuple(shape)
