"""The tokenizer protocol, the byte tokenizer, and `load_tokenizer`, which reads every kind by its spec."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_adamba.config.root import TOKENIZER_FILES, find_tokenizer
from megatron_adamba.data import tokenizer_tiktoken
from megatron_adamba.data.tokenizer_hugging_face import HuggingFaceTokenizer
from megatron_adamba.data.tokenizer_options import FOLDER_FLAGS, TOOL_FLAGS, TokenizerFlags
from megatron_adamba.data.tokenizer_sentencepiece import SentencePieceTokenizer
from megatron_adamba.data.tokenizer_tiktoken import RankChoice, TiktokenTokenizer
from megatron_adamba.errors import TokenizerError

KINDS = "bytes, FILE.model (sentencepiece), tokenizer.json (a file or its folder), tiktoken:NAME_OR_FILE"


class Tokenizer(Protocol):
    """Text to token ids and back.

    `hash` is the sha256 (hex) of what defines the tokenizer, the same on every machine and under every path.
    `vocab_size` is one more than the largest id. `eod_id` closes a document and, as an input, opens the next one.
    """

    name: str
    vocab_size: int
    eod_id: int
    hash: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. No special token is added, and the spelling of one in `text` is plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without end-of-document tokens; bytes that are not UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """

    def carried(self) -> dict[str, bytes]:
        """Files, by name, from which `load_tokenizer` of their folder makes this tokenizer again, whatever becomes of
        the one that it was read from; none for bytes, which need no file."""


class ByteTokenizer:
    """One token per UTF-8 byte, and id 256 as end of document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"bytes, eod 256").hexdigest()

    def carried(self) -> dict[str, bytes]:
        return {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        try:
            return bytes(kept).decode("utf-8", errors="replace")
        except ValueError:
            worst = next(token for token in kept if not 0 <= token < 256)
            raise TokenizerError(f"token id {worst} is not in the bytes tokenizer: ids go from 0 to 256") from None


def load_tokenizer(
    spec: str,
    eod_token: str | None = None,
    split_pattern: str | None = None,
    *,
    flags: TokenizerFlags = TOOL_FLAGS,
    usual_pattern: str | None = None,
    network: bool = False,
) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: `bytes`; a sentencepiece `.model` file; a Hugging Face `tokenizer.json`; a `.tiktoken` file of BPE ranks;
            a folder that holds one of these under its usual name; `tiktoken:` and either a file of ranks or the name
            of a published encoding.
        eod_token: the end-of-document token by name, where it is none of the usual names.
        split_pattern: of a file of ranks: the name of the encoding that it was made with, or a regular expression.
        flags: what the messages call the three above.
        usual_pattern: what `split_pattern` is where nothing at all says it.
        network: whether the user named `spec`: a published encoding may then be downloaded.

    What a file cannot say may lie beside it (`TokenizerNote`).

    Raises:
        TokenizerError: nothing is there, it cannot be read, it has no end-of-document token, or nothing says how a
            file of ranks splits text.
    """
    if not spec or "\0" in spec:
        raise TokenizerError(f"{flags.tokenizer} {spec!r}: names nothing; give one of {KINDS}")
    if spec == "bytes":
        if eod_token is not None:
            raise TokenizerError(
                f"{flags.tokenizer} bytes: its end-of-document token is fixed; leave {flags.eod_token} out"
            )
        _refuse_pattern("bytes", split_pattern, flags)
        return ByteTokenizer()
    choice = RankChoice(eod_token, split_pattern, usual_pattern)
    if spec.startswith("tiktoken:"):
        name = spec.removeprefix("tiktoken:")
        path = Path(name, tokenizer_tiktoken.CARRIED_NAME) if os.path.isdir(name) else Path(name)
        if os.path.exists(path):
            return TiktokenTokenizer.load(path, choice, flags)
        return TiktokenTokenizer.published(name, choice, flags, network)
    path = _tokenizer_file(spec, flags)
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer.load(path, choice, flags)
    _refuse_pattern(spec, split_pattern, flags)
    kind = SentencePieceTokenizer if path.suffix == ".model" else HuggingFaceTokenizer
    return kind.load(path, eod_token, flags)


def _refuse_pattern(spec: str, split_pattern: str | None, flags: TokenizerFlags) -> None:
    if split_pattern is not None:
        raise TokenizerError(
            f"{flags.tokenizer} {spec}: how it splits text is known, of files of ranks (.tiktoken) alone it is not; "
            f"leave {flags.split_pattern} out"
        )


def _tokenizer_file(spec: str, flags: TokenizerFlags) -> Path:
    path = Path(spec)
    if os.path.isdir(path):
        for name in TOKENIZER_FILES:
            if os.path.exists(path / name):
                return path / name
        raise TokenizerError(
            f"{flags.tokenizer} {spec}: the folder holds no {' or '.join(TOKENIZER_FILES)}; give {KINDS}"
        )
    if not os.path.exists(path):
        raise TokenizerError(f"{flags.tokenizer} {spec}: no such file; give one of {KINDS}")
    if path.suffix not in (".model", ".json", ".tiktoken"):
        raise TokenizerError(f"{flags.tokenizer} {spec}: the kind is told by the file's ending; give one of {KINDS}")
    return path


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a canonical checkpoint brings, or that its config.json names. Raises TokenizerError."""
    found = find_tokenizer(folder)
    if found is None:
        raise TokenizerError(f"{folder}: holds no tokenizer, and its config.json names none; copy tokenizer.json there")
    return load_tokenizer(found, flags=FOLDER_FLAGS)
