"""sentencepiece `.model` files, read so that what encodes also decodes to the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.errors import TokenizerError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space inside its pieces."""


class SentencePieceTokenizer:
    """A sentencepiece model (a serialized `ModelProto`)."""

    def __init__(self, processor: SentencePieceProcessor, name: str, eod_id: int, content: bytes) -> None:
        self._processor = processor
        self.name = name
        self.eod_id = eod_id
        self.vocab_size = processor.get_piece_size()
        self.hash = hashlib.sha256(content).hexdigest()
        self._mark_ids = _space_mark_ids(processor)

    @classmethod
    def load(cls, path: Path, eod_token: str | None = None) -> SentencePieceTokenizer:
        """Reads `path`. Raises TokenizerError: not a sentencepiece model, or without an end-of-document piece."""
        from sentencepiece import SentencePieceProcessor

        try:
            content = path.read_bytes()
            processor = SentencePieceProcessor(model_proto=content)
            whole = bool(content)  # the constructor takes no bytes for no model, without a word
        except (OSError, RuntimeError):
            whole = False
        if not whole:
            raise TokenizerError(
                f"--tokenizer {path}: not a sentencepiece model; make one with tools/train_tokenizer.py"
            )
        eod_id = _find_eod(processor, eod_token)
        if eod_id is None:
            wanted = eod_token or "<eod>, an eos piece, <|endoftext|>"
            raise TokenizerError(
                f"--tokenizer {path}: no end-of-document piece ({wanted}); name one of its pieces with --eod-token"
            )
        return cls(processor, path.stem, eod_id, content)

    def encode(self, text: str) -> list[int]:
        if self._mark_ids is None or SPACE_MARK not in text:
            return self._processor.encode(text)
        # The library takes U+2581 in a text for a space; as bytes it survives.
        first, *rest = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids.extend(self._mark_ids)
            ids.extend(self._processor.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        try:
            return self._processor.decode(kept)
        except (IndexError, OverflowError):
            raise TokenizerError(f"a token id is not in {self.name}: ids go from 0 to {self.vocab_size - 1}") from None


def _find_eod(processor: SentencePieceProcessor, eod_token: str | None) -> int | None:
    def piece_id(piece: str) -> int | None:
        found = processor.piece_to_id(piece)
        return found if processor.id_to_piece(found) == piece else None

    if eod_token is not None:
        return piece_id(eod_token)
    if (found := piece_id("<eod>")) is not None:
        return found
    return processor.eos_id() if processor.eos_id() >= 0 else piece_id("<|endoftext|>")


def _space_mark_ids(processor: SentencePieceProcessor) -> list[int] | None:
    """Ids of the three bytes of U+2581, or None where the model has no byte pieces or adds a space in front.

    (A text cut at U+2581 would get such a space in front of every part.)
    """
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    whole = all(processor.is_byte(token) for token in ids)
    adds_space = processor.id_to_piece(processor.encode("a"))[0].startswith(SPACE_MARK)
    return ids if whole and not adds_space else None
