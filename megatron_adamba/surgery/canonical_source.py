"""Opening a canonical checkpoint for an operation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.checkpoint.canonical import WEIGHT_PREFIX
from megatron_adamba.checkpoint.offline import (
    CANONICAL,
    OpenCheckpoint,
    check_weights,
    find_checkpoint,
    open_checkpoint,
)
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import TOKENIZER_FILES, TOKENIZER_NOTE
from megatron_adamba.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class CanonicalSource:
    """Names and shapes of all its weights are those of its config's model."""

    opened: OpenCheckpoint
    config: ResolvedModel
    """resolved"""

    def read(self, name: str) -> Tensor:
        return self.opened.read(WEIGHT_PREFIX + name)

    def dtype(self, name: str) -> torch.dtype:
        return self.opened.infos[WEIGHT_PREFIX + name].dtype

    def tokenizer_files(self) -> list[Path]:
        """Tokenizers that lie beside the weights, the one that config.json names among them, and notes beside these."""
        data = self.opened.config.get("data")
        named = data.get("tokenizer") if isinstance(data, dict) else None
        names = dict.fromkeys([*([Path(named).name] if isinstance(named, str) else []), *TOKENIZER_FILES])
        both = [name + suffix for name in names if name for suffix in ("", TOKENIZER_NOTE)]
        return [path for name in both if os.path.isfile(path := self.opened.folder / name)]


def open_canonical(folder: Path) -> CanonicalSource:
    """Raises CheckpointError naming the file or tensor that is missing, unknown, damaged or of another shape."""
    kind, _ = find_checkpoint(folder)
    if kind != CANONICAL:
        raise CheckpointError(
            f"{folder}: is a training checkpoint; make it canonical first: adamba checkpoint convert {folder} DST"
        )
    opened = open_checkpoint(folder)
    config, _ = check_weights(opened)
    return CanonicalSource(opened, config)


def require_whole(config: ResolvedModel, folder: Path, operation: str) -> None:
    """For operations that take the widest row of the nest for all there is. Raises ConfigError with a way out."""
    hidden, widest = config.hidden_size, config.nest[-1]
    if config.layer_widths is not None or widest.width != hidden:
        raise ConfigError(
            f"{folder}: was extracted, and some of its blocks are narrower than its {hidden} channels; {operation} the "
            f"model that it comes from"
        )
    unused = [
        f"{name} {used} of {there}"
        for name, used, there in (
            ("kv_groups", widest.kv_groups, config.num_kv_groups),
            ("ffn", widest.ffn, config.ffn_size),
            ("expert_ffn", widest.expert_ffn, config.expert_ffn_size if "E" in config.block_pattern else 0),
        )
        if used < there
    ]
    if unused:
        raise ConfigError(
            f"{folder}: its full width leaves units unused ({', '.join(unused)}); take them out first: "
            f"adamba surgery extract {folder} DST --width {hidden}"
        )
