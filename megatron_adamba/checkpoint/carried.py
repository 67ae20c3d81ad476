"""The tokenizer files that a checkpoint carries beside its tensors, so that it reads on its own wherever it goes."""

from __future__ import annotations

from pathlib import Path

from megatron_adamba.config.root import TOKENIZER_FILES, TOKENIZER_NOTE


def carried_files(folder: Path) -> dict[str, bytes]:
    """What is there of them, by name. Raises OSError."""
    names = [name + suffix for name in TOKENIZER_FILES for suffix in ("", TOKENIZER_NOTE)]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
