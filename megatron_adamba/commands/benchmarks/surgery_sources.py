"""Synthetic checkpoints for `surgery`: our own, nanochat's and GPT-OSS's, of any size, no tensor above 400 MB."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import write_canonical
from megatron_adamba.checkpoint.shards import TensorInfo, plan_shards, shard_name
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.surgery.gpt_oss import LAYOUTS, source_shape
from megatron_adamba.surgery.gpt_oss_config import HUGGING_FACE, read_gpt_oss_config, to_hugging_face
from megatron_adamba.surgery.mxfp4 import BLOCK_VALUES
from megatron_adamba.surgery.nanochat import OWN
from megatron_adamba.surgery.nanochat_config import CodeSettings, read_metadata
from megatron_adamba.surgery.torch_file_writer import write_torch_file

HEAD_DIM = 64
LARGEST_HIDDEN, HIDDEN_STEP = 2560, 256
"""the first keeps every tensor below 400 MB, an expanded one too; a quarter more of the second is whole heads"""
FULL_SIZE = 8e9
"""bytes from which on models grow in depth alone"""
_BLOCK = 1 << 24
"""random values that are drawn; tensors repeat them"""


def hidden_of(num_bytes: float) -> int:
    """Channels of a model of about so many bytes."""
    share = min(num_bytes / FULL_SIZE, 1.0)
    return HIDDEN_STEP * max(1, round(math.sqrt(share) * LARGEST_HIDDEN / HIDDEN_STEP))


@dataclass(frozen=True)
class Shape:
    """hidden_size, and how many blocks make up about so many bytes of `itemsize`."""

    hidden: int
    blocks: int

    @classmethod
    def of(cls, num_bytes: float, itemsize: int, ends: float, block: float) -> Shape:
        """ends, block: elements of embedding and head, and of one block, in units of hidden_size squared."""
        hidden = hidden_of(num_bytes)
        return cls(hidden, max(1, round((num_bytes / itemsize / hidden**2 - ends) / block)))


def write_own(folder: Path, num_bytes: float) -> int:
    """Canonical, bf16: blocks T and E in turn. Returns the number of pairs."""
    shape = Shape.of(num_bytes, 2, ends=2 * 24, block=12 + 4 + 3 * 16)
    hidden = shape.hidden
    config = resolve_model(
        ModelConfig(
            hidden_size=hidden,
            block_pattern="TE" * shape.blocks,
            vocab_size=24 * hidden,
            head_dim=HEAD_DIM,
            num_experts=16,
            expert_ffn_size=hidden,
            widths=[hidden // 4, hidden // 2, hidden],
        )
    )
    infos = {spec.name: TensorInfo(spec.shape, torch.bfloat16) for spec in manifest(config)}
    write_canonical(folder, {"model": asdict(config)}, _random_tensors(infos), infos=infos)
    return shape.blocks


def write_nanochat(folder: Path, num_bytes: float) -> int:
    """model_000001.pt as nanochat keeps it, a bf16 embedding and all else fp32. Returns the number of blocks."""
    shape = Shape.of(num_bytes, 4, ends=1.5 * 12, block=12)
    metadata = {
        "sequence_len": 2048,
        "vocab_size": 12 * shape.hidden,
        "n_layer": shape.blocks,
        "n_head": shape.hidden // HEAD_DIM,
        "n_kv_head": shape.hidden // HEAD_DIM,
        "n_embd": shape.hidden,
    }
    path, values = folder / "meta_000001.json", {"step": 1, "model_config": metadata}
    config = resolve_model(read_metadata(path, values, CodeSettings(), None))
    specs = [spec for spec in manifest(config) if spec.group != "gain"]
    dtypes = {"embedding.weight": torch.bfloat16}
    infos = {OWN.place(spec.name): TensorInfo(spec.shape, dtypes.get(spec.name, torch.float32)) for spec in specs}
    folder.mkdir()
    path.write_text(json.dumps(values))
    write_torch_file(folder / "model_000001.pt", infos, _random_tensors(infos))
    return shape.blocks


def write_gpt_oss(folder: Path, num_bytes: float, layout_name: str, packed: bool) -> int:
    """bf16, the experts MXFP4 where `packed`; num_bytes: of its canonical form, all bf16. Returns the number of blocks.

    Gate and up are one tensor in a source of bf16, and twice as large in bf16 as all else that MXFP4 becomes.
    """
    experts = 28 if packed else 12
    shape = Shape.of(num_bytes, 2, ends=2 * 24, block=2.5 + 3 * experts)
    hidden = shape.hidden
    values = {
        "num_hidden_layers": shape.blocks, "num_experts": experts, "experts_per_token": 4, "vocab_size": 24 * hidden,
        "hidden_size": hidden, "intermediate_size": hidden, "swiglu_limit": 7.0, "head_dim": HEAD_DIM,
        "num_attention_heads": hidden // HEAD_DIM, "num_key_value_heads": hidden // HEAD_DIM // 4,
        "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    path = folder / "config.json"
    config = resolve_model(read_gpt_oss_config(path, values)[1])
    infos = _gpt_oss_infos(config, layout_name, packed)
    folder.mkdir()
    path.write_text(json.dumps(to_hugging_face(config, "bfloat16") if layout_name == HUGGING_FACE else values))
    shards = plan_shards(infos, 10**9)
    for number, names in enumerate(shards):
        tensors = dict(_random_tensors({name: infos[name] for name in names}))
        save_file(tensors, folder / shard_name(number, len(shards)), metadata={"format": "pt"})
    return shape.blocks


def _gpt_oss_infos(config: ResolvedModel, layout_name: str, packed: bool) -> dict[str, TensorInfo]:
    layout, infos = LAYOUTS[layout_name], {}
    for spec in manifest(config):
        if spec.group == "gain":
            continue
        place = layout.place(spec.name)
        if packed and place.expert_matrix:
            *rows, inputs = source_shape(config, spec, place, transposed=False)
            groups = (*rows, inputs // BLOCK_VALUES)
            infos[place.name + layout.blocks_suffix] = TensorInfo((*groups, BLOCK_VALUES // 2), torch.uint8)
            infos[place.name + layout.scales_suffix] = TensorInfo(groups, torch.uint8)
        else:
            shape = source_shape(config, spec, place, layout.transposed and place.expert_matrix)
            infos[place.name] = TensorInfo(shape, torch.bfloat16)
    return infos


def _random_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Small normal values; of bytes those between 100 and 126, which as scales of MXFP4 make such values."""
    generator = torch.Generator().manual_seed(0)
    blocks = {torch.uint8: torch.randint(100, 127, (_BLOCK,), dtype=torch.uint8, generator=generator)}
    normal = torch.randn(_BLOCK, generator=generator).mul_(0.02)
    blocks |= {torch.float32: normal, torch.bfloat16: normal.bfloat16()}
    for name, info in infos.items():
        block = blocks[info.dtype]
        yield name, block.repeat(-(-info.numel // block.numel()))[: info.numel].reshape(info.shape)
