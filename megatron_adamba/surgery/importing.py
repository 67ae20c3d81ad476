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
from megatron_adamba.config.resolved import ResolvedModel
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


def with_nest(config: ModelConfig, path: Path, widths: Sequence[int] | None) -> ResolvedModel:
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


@dataclass(frozen=True)
class ImportedTokenizer:
    """What comes along with the weights."""

    name: str | None
    """of the file that it was read from; None where there is none"""
    settings: dict[str, Any]
    """what config.json says of it"""
    contents: dict[str, bytes]
    """files to write beside the weights"""
    note: str = ""
    """for people, where there is none"""
    id_of: Callable[[str | None], int | None] = lambda name: None
    """of a token by its name, of None that of the end of a document; None where the tokenizer has no such token"""


@dataclass(frozen=True)
class TokenizerChoice:
    """What the user says of the tokenizer; None: nothing."""

    file: Path | None = None
    eod_token: str | None = None
    split_pattern: str | None = None


def as_choice(given: Path | TokenizerChoice | None) -> TokenizerChoice:
    return given if isinstance(given, TokenizerChoice) else TokenizerChoice(given)


def import_tokenizer(
    folders: Sequence[Path], choice: TokenizerChoice, vocab_size: int, usual_pattern: str
) -> ImportedTokenizer:
    """The tokenizer that was chosen, or else the first that lies in one of the source's folders.

    usual_pattern: how the makers of such models split text, for a file of ranks that says nothing else. Raises
    TokenizerError.
    """
    path = choice.file or own_tokenizer(folders)
    if path is None:
        kept = next((folder / "tokenizer.pkl" for folder in folders if (folder / "tokenizer.pkl").is_file()), None)
        why = f"{kept} is a pickle, which is not read" if kept else f"{folders[0]} has none"
        note = f"no tokenizer came along ({why}): the model takes no text until one is there; give --tokenizer FILE"
        return ImportedTokenizer(None, {}, {}, note)
    if path.suffix in _PICKLES:
        raise TokenizerError(
            f"--tokenizer {path}: is a pickle, which can run code when it is read; give its tokenizer.json, or its "
            f"ranks as FILE.tiktoken: a line is a byte string in base64, a space and its rank"
        )
    tokenizer = load_tokenizer(
        str(path), choice.eod_token, choice.split_pattern, usual_pattern=usual_pattern, network=choice.file is not None
    )
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"--tokenizer {path}: has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}"
        )
    contents = tokenizer.carried()
    settings = {"data": {"tokenizer": next(iter(contents), str(path))}, "tokenizer_hash": tokenizer.hash}

    def id_of(name: str | None) -> int | None:
        try:
            named = load_tokenizer(
                str(path), name or choice.eod_token, choice.split_pattern, usual_pattern=usual_pattern, network=False
            )
        except TokenizerError:
            return None
        return named.eod_id

    return ImportedTokenizer(path.name, settings, contents, id_of=id_of)


def own_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first tokenizer of the source's folders: a usual name, or the one file of ranks."""
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
        ranks = sorted(path for path in folder.glob("*.tiktoken") if path.is_file())
        if len(ranks) == 1:
            return ranks[0]
    return None


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
