"""The tokenizer of a run: the one that was named, or, where a run goes on without it, the one in its checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megatron_adamba.checkpoint.background import Write
from megatron_adamba.checkpoint.carried import carried_files
from megatron_adamba.checkpoint.training import read_state, save_training_checkpoint
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.data.tokenizer import Tokenizer, load_tokenizer
from megatron_adamba.data.tokenizer_options import FOLDER_FLAGS, RUN_FLAGS
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError

_CHOICE = ("tokenizer", "eod_token", "split_pattern")
"""settings of the data section that choose a tokenizer"""


def saving_with_tokenizer(tokenizer: Tokenizer) -> Write:
    """What writes a run's checkpoints, the tokenizer beside the tensors."""
    return partial(save_training_checkpoint, carried=tokenizer.carried())


def named_tokenizer(config: AdambaConfig) -> str:
    """`--data.tokenizer`. Raises ConfigError where it is not given."""
    if config.data.tokenizer is None:
        raise ConfigError("--data.tokenizer: not given; try --data.tokenizer bytes")
    return config.data.tokenizer


def run_tokenizer(config: AdambaConfig, named_by_user: bool) -> tuple[Tokenizer, str]:
    """The tokenizer and what to say about it.

    A run that goes on under the same settings keeps its tokenizer, whatever has become of the file since.
    named_by_user: whether a published encoding may be downloaded. Raises TokenizerError.
    """
    data, name = config.data, named_tokenizer(config)
    named: Tokenizer | TokenizerError
    try:
        named = load_tokenizer(name, data.eod_token, data.split_pattern, flags=RUN_FLAGS, network=named_by_user)
    except TokenizerError as error:
        named = error
    kept, folder = _carried_tokenizer(config)
    if isinstance(named, TokenizerError):
        if kept is None:
            raise named
        why = "cannot be read any more"
    elif kept is None or named.hash == kept.hash:
        return named, ""
    else:
        why = "is another one by now"
    return kept, f"{name} {why}: the run goes on with its own, in {folder}"


def _carried_tokenizer(config: AdambaConfig) -> tuple[Tokenizer | None, Path | None]:
    """Of the newest checkpoint that the run may go on from, if the run chose its tokenizer as it does now."""
    wanted = config.checkpoint.resume
    if wanted == "never":
        return None, None
    root = Path(config.logging.run_dir) / "checkpoints"
    folders = sorted(root.glob("step-*"), reverse=True) if wanted == "auto" else [Path(wanted)]
    chosen = {name: getattr(config.data, name) for name in _CHOICE}
    for folder in folders:
        try:
            data = read_state(folder)["config"]["data"]
            if carried_files(folder) and _choice(data) == chosen:
                return load_tokenizer(str(folder), flags=FOLDER_FLAGS), folder
        except (CheckpointError, TokenizerError, OSError, LookupError, TypeError):
            continue  # a damaged checkpoint has nothing to offer; whoever resumes from it will say so
    return None, None


def _choice(data: Any) -> dict[str, Any]:
    return {name: data.get(name) for name in _CHOICE} if isinstance(data, dict) else {}
