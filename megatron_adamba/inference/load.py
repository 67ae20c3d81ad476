"""A model and its tokenizer from a canonical checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.config.root import find_tokenizer, read_model_config, read_run_config
from megatron_adamba.config.rules import one_of
from megatron_adamba.data.tokenizer import Tokenizer, load_tokenizer
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.host_memory import keep_freed_pages


@dataclass
class LoadedModel:
    """Ready for evaluation: in eval mode, no gradients."""

    model: AdambaModel
    tokenizer: Tokenizer
    device: torch.device


def load_model(folder: str | Path, dtype: str = "bf16", device: torch.device | None = None) -> LoadedModel:
    """Read config.json, the weights and the tokenizer. Raises CheckpointError, TokenizerError, ConfigError.

    dtype: bf16 | fp32.
    """
    one_of("--dtype", dtype, ("bf16", "fp32"))
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"--model {folder}: no such folder; a run leaves one at RUN/model")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_pages()
    try:
        config = read_model_config(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    tokenizer = _tokenizer(folder)
    model = AdambaModel(config, device="meta").to_empty(device="cpu")
    load_into(model, folder)
    model.to(device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.requires_grad_(False).eval()
    return LoadedModel(model, tokenizer, device)


def _tokenizer(folder: Path) -> Tokenizer:
    found = find_tokenizer(folder)
    if found is None:
        raise TokenizerError(f"{folder}: holds no tokenizer, and its config.json names none; copy tokenizer.json there")
    tokenizer = load_tokenizer(found)
    wanted = read_run_config(folder).get("tokenizer_hash")
    if wanted is not None and tokenizer.hash != wanted:
        raise TokenizerError(
            f"{folder}: its tokenizer is not the one it was trained with ({wanted[:12]}); restore the file"
        )
    return tokenizer
