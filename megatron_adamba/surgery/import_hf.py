"""Folders of transformers as canonical checkpoints, by the architecture that their config.json names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.import_nanochat import import_hugging_face_nanochat
from megatron_adamba.surgery.importing import TokenizerChoice
from megatron_adamba.surgery.sources import read_settings
from megatron_adamba.surgery.writing import Job

IMPORTS = {"NanoChatForCausalLM": import_hugging_face_nanochat, "GptOssForCausalLM": import_gpt_oss}
MODEL_TYPES = {"nanochat": "NanoChatForCausalLM", "gpt_oss": "GptOssForCausalLM"}


def import_hugging_face(
    source: Path, widths: Sequence[int] | None = None, tokenizer: Path | TokenizerChoice | None = None
) -> Job:
    """Plan the canonical checkpoint of a transformers folder; arguments as in `import_gpt_oss`.

    Raises CheckpointError naming an architecture that is not read; ConfigError (widths), TokenizerError.
    """
    path = source / "config.json"
    return IMPORTS[_architecture(path, read_settings(path))](source, widths, tokenizer)


def _architecture(path: Path, values: dict[str, Any]) -> str:
    if isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path}: is a canonical checkpoint's already; there is nothing to import")
    named, kind = values.get("architectures"), values.get("model_type")
    if named is None and kind is None:
        raise CheckpointError(f"{path}: names no architecture; give the folder that transformers' save_pretrained made")
    known = ", ".join(IMPORTS)
    if named is None:
        if kind not in list(MODEL_TYPES):
            known = ", ".join(MODEL_TYPES)
            raise CheckpointError(f"{path}: model_type {repr(kind)[:120]} is not read; one of {known} is")
        return MODEL_TYPES[kind]
    if named not in [[name] for name in IMPORTS]:
        raise CheckpointError(f"{path}: architectures {repr(named)[:120]} is not read; one of {known} is")
    return named[0]
