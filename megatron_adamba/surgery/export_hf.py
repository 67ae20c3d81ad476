"""A canonical checkpoint as a folder of transformers: NanoChatForCausalLM or GptOssForCausalLM, by its blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_adamba.surgery.canonical_source import open_canonical
from megatron_adamba.surgery.export_gpt_oss import export_hugging_face
from megatron_adamba.surgery.export_nanochat import export_hugging_face_nanochat
from megatron_adamba.surgery.writing import Job


def export_by_blocks(source: Path, dtype: torch.dtype | None = None) -> Job:
    """Plan the folder: of a model with E blocks GPT-OSS's, of any other NanoChat's.

    dtype: of every tensor; None takes GPT-OSS's from the embedding and keeps each of NanoChat's.
    Raises CheckpointError naming what transformers does not have.
    """
    moe = "E" in open_canonical(source).config.block_pattern
    return (export_hugging_face if moe else export_hugging_face_nanochat)(source, dtype)
