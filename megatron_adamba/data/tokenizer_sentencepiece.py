"""sentencepiece `.model` files, read so that what encodes also decodes to the same text."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adamba.config.root import TOKENIZER_NOTE
from megatron_adamba.data.tokenizer_options import (
    LARGEST_FILE,
    MOST_IDS,
    PROBE,
    TOOL_FLAGS,
    TokenizerFlags,
    TokenizerNote,
    clean_text,
    library_failures,
)
from megatron_adamba.errors import TokenizerError
from megatron_adamba.schema import read_regular

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

CARRIED_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space inside its pieces."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""first line of a file of ranks, which Llama 3 publishes as tokenizer.model too"""
_FOUND_IN_TEXT = (_NORMAL, _USER_DEFINED)
"""types of pieces, as `sentencepiece_model.proto` numbers them"""


class SentencePieceTokenizer:
    """A sentencepiece model (a serialized `ModelProto`)."""

    def __init__(self, processor: SentencePieceProcessor, name: str, eod_id: int, content: bytes) -> None:
        self._processor = processor
        self.name = name
        self.eod_id = eod_id
        self.vocab_size: int = processor.get_piece_size()
        self._content = content
        self._chosen = processor.id_to_piece(eod_id) if eod_id != _find_eod(processor, None) else None
        # another end of document makes it another tokenizer
        mark = b"" if self._chosen is None else b"\0eod %d" % eod_id
        self.hash = hashlib.sha256(content + mark).hexdigest()
        self._mark_ids = _space_mark_ids(processor)

    @classmethod
    def load(
        cls, path: Path, eod_token: str | None = None, flags: TokenizerFlags = TOOL_FLAGS
    ) -> SentencePieceTokenizer:
        """Reads `path`. Raises TokenizerError: not a sentencepiece model, or without an end-of-document piece."""
        where = f"{flags.tokenizer} {path}"
        content = read_regular(path, TokenizerError, f"give a file for {flags.tokenizer}", LARGEST_FILE)
        eod_token = eod_token or TokenizerNote.beside(path).eod_token
        if _RANKS.match(content):
            raise TokenizerError(
                f"{where}: holds ranks, as tiktoken's files do; give {flags.tokenizer} tiktoken:{path}, and with "
                f"{flags.split_pattern} the pattern that splits text"
            )
        with library_failures(f"{where}: not a sentencepiece model ({{reason}}); make one with adamba tokenizer"):
            model = _read_model(content)
            processor = _processor(content)
            eod_id = _find_eod(processor, eod_token)
        if eod_id is None:
            wanted = eod_token or "<eod>, an eos piece, <|endoftext|>"
            raise TokenizerError(
                f"{where}: no end-of-document piece ({wanted}); name one of its pieces with {flags.eod_token}"
            )
        with library_failures(f"{where}: cannot be used ({{reason}})"):
            if model.pieces[eod_id].type in _FOUND_IN_TEXT:
                # a piece of another type is found in text: a document that spells it would be cut in two there
                model.pieces[eod_id].type = _CONTROL
                processor = _processor(model.SerializeToString())
            loaded = cls(processor, path.stem, eod_id, content)
            loaded.decode(loaded.encode(PROBE))
        return loaded

    def carried(self) -> dict[str, bytes]:
        files = {CARRIED_NAME: self._content}
        if self._chosen is not None:
            files[CARRIED_NAME + TOKENIZER_NOTE] = TokenizerNote(eod_token=self._chosen).content()
        return files

    def encode(self, text: str) -> list[int]:
        text = clean_text(text)
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


def _read_model(content: bytes) -> Any:
    """The serialized model, a ModelProto, once what the library takes without a look has been looked at. Raises
    ValueError."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made when imported

    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(error) from None
    if not 0 < len(model.pieces) < MOST_IDS:
        raise ValueError(f"{len(model.pieces)} pieces")
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ValueError("a score is not finite")
    return model


def _processor(content: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=content)


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
