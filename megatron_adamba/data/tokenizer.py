"""The tokenizer protocol, the byte tokenizer, and `load_tokenizer`, which reads every kind by its spec."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_adamba.data.tokenizer_files import HuggingFaceTokenizer, TiktokenTokenizer
from megatron_adamba.data.tokenizer_sentencepiece import SentencePieceTokenizer
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


class ByteTokenizer:
    """One token per UTF-8 byte, and id 256 as end of document."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def __init__(self) -> None:
        self.hash = hashlib.sha256(b"bytes, eod 256").hexdigest()

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


def load_tokenizer(spec: str, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: `bytes`; a sentencepiece `.model` file; a Hugging Face `tokenizer.json` or a folder that holds one
            (or a `tokenizer.model`); `tiktoken:` and either a file of BPE ranks or the name of an encoding.
        eod_token: the end-of-document token by name, for sentencepiece and Hugging Face files in which the usual
            names are missing.

    Raises:
        TokenizerError: nothing is there, it cannot be read, or it has no end-of-document token.
    """
    if spec == "bytes" or spec.startswith("tiktoken:") or spec.endswith(".tiktoken"):
        if eod_token is not None:
            raise TokenizerError(f"--tokenizer {spec}: its end-of-document token is fixed; leave --eod-token out")
        return ByteTokenizer() if spec == "bytes" else TiktokenTokenizer.load(spec.removeprefix("tiktoken:"))
    path = _tokenizer_file(spec)
    if path.suffix == ".model":
        return SentencePieceTokenizer.load(path, eod_token)
    return HuggingFaceTokenizer.load(path, eod_token)


def _tokenizer_file(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise TokenizerError(f"--tokenizer {spec}: the folder holds no tokenizer.json or tokenizer.model; give {KINDS}")
    if not path.is_file():
        raise TokenizerError(f"--tokenizer {spec}: no such file; give one of {KINDS}")
    if path.suffix not in (".model", ".json"):
        raise TokenizerError(f"--tokenizer {spec}: the kind is told by the file's ending; give one of {KINDS}")
    return path
