"""What imports of other software's checkpoints share: the nest, the tokenizer, new gains, claiming tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import TOKENIZER_FILES
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.surgery.sources import DTYPE_NAMES, Entry
from megatron_adamba.surgery.writing import PlannedTensor

FLOATS = (torch.bfloat16, torch.float32)
_ROWS_AT_ONCE = 2**22
"""values"""
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


class Source(Protocol):
    """Somebody else's tensors: `TensorFolder` or `TorchFile`."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def with_nest(config: ModelConfig, path: Path, widths: Sequence[int] | None) -> ModelConfig:
    """The config that `path` holds, resolved, with a nest of `widths`; None takes 1/16, 1/4, 1/2 and all of the hidden
    size where these are whole numbers, else all of it. Raises CheckpointError naming the file, ConfigError (widths)."""
    try:
        config.check()
        resolve_model(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    hidden = config.hidden_size
    if widths is None:
        widths = [hidden // 16, hidden // 4, hidden // 2, hidden] if hidden % 16 == 0 else [hidden]
    try:
        return resolve_model(replace(config, widths=list(widths)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model.widths", "--widths")) from None


def tokenizer_settings(path: Path | None, vocab_size: int) -> dict[str, Any]:
    """What config.json says of a tokenizer that lies beside it; nothing without one. Raises TokenizerError."""
    if path is None:
        return {}
    if path.suffix in _PICKLES:
        raise TokenizerError(
            f"--tokenizer {path}: is a pickle, which can run code when it is read; give its tokenizer.json, or its "
            f"ranks as FILE.tiktoken"
        )
    tokenizer = load_tokenizer(str(path))
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"--tokenizer {path}: has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}"
        )
    return {"data": {"tokenizer": path.name}, "tokenizer_hash": tokenizer.hash}


def own_tokenizer(*folders: Path) -> Path | None:
    """tokenizer.json or tokenizer.model of the first folder that has one."""
    return next((path for folder in folders for name in TOKENIZER_FILES if (path := folder / name).is_file()), None)


def given_tokenizer(path: Path | None) -> Path | None:
    """The file that --tokenizer means: a folder's own, one behind `tiktoken:`."""
    if path is None:
        return None
    if path.is_dir():
        return own_tokenizer(path) or path
    name = str(path).removeprefix("tiktoken:")
    return Path(name) if Path(name).is_file() else path


def new_gain(spec: ParamSpec) -> PlannedTensor:
    return PlannedTensor(spec.name, spec.shape, torch.float32, "new: ones", partial(torch.ones, spec.shape))


def tied_head(source: Source, where: Path, head: str, embedding: str) -> set[str]:
    """The head of a tied model, where a source stores it beside the embedding: a copy, which is left out.

    Raises CheckpointError where it is none. Memory: some rows of both.
    """
    if head not in source.entries or embedding not in source.entries:
        return set()
    first, second = source.entries[head].info.shape, source.entries[embedding].info.shape
    rows = max(1, _ROWS_AT_ONCE // max(first[-1] if first else 1, 1))
    same = first == second and all(
        torch.equal(source.rows(head, start, start + rows).float(), source.rows(embedding, start, start + rows).float())
        for start in range(0, first[0] if first else 0, rows)
    )
    if not same:
        raise CheckpointError(
            f"{where}: tensor {head} is not {embedding}, though config.json ties the two (tie_word_embeddings); set it "
            f"to false there if the head is its own"
        )
    return {head}


@dataclass
class Claims:
    """Tensors of a source, each to be used once; `finish` names one that nobody used."""

    source: Source
    where: Path
    """file or folder, for complaints"""
    says: str
    """what the shapes follow from: config.json, the metadata"""
    used: set[str] = field(default_factory=set)

    def take(self, name: str, fits: Callable[[tuple[int, ...]], bool], shape: tuple[int, ...]) -> Entry:
        """Mark a tensor as used. fits: whether its shape will do; shape: the one that it should have.

        Raises CheckpointError naming a tensor that is missing, used already, or of another dtype or shape.
        """
        entry = self.source.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.where}: has no tensor {name}")
        if name in self.used:
            raise CheckpointError(f"{self.where}: tensor {name} would have two places")
        info = entry.info
        if info.dtype not in FLOATS:
            found = DTYPE_NAMES.get(info.dtype, str(info.dtype))
            raise CheckpointError(f"{self.where}: {name} is {found}, must be bf16 or fp32")
        if not fits(info.shape):
            raise CheckpointError(f"{self.where}: {name} has shape {info.shape}, {self.says} makes it {shape}")
        self.used.add(name)
        return entry

    def finish(self, kind: str) -> None:
        """Raises CheckpointError naming the first tensor that has no place in a model of this kind."""
        if extra := sorted(set(self.source.entries) - self.used):
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise CheckpointError(f"{self.where}: tensor {extra[0]}{more} has no place in a {kind} model")
