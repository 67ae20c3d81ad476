"""Training a lossless byte-pair sentencepiece model whose pieces may hold newlines, tabs and indentation.

sentencepiece's trainer treats two characters apart: a space may only lead a piece, and a tab may not occur at all.
Both are therefore shown to it as private-use characters, and the finished model gets the real ones back. Pieces
never span two of the chunks cut here, which keeps words apart without the trainer's own splitting.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_adamba.data.tokenizer_sentencepiece import SPACE_MARK, SentencePieceTokenizer
from megatron_adamba.errors import ConfigError, DataError, TokenizerError
from megatron_adamba.files import write_atomically

SPACE_STAND_IN = "\ue020"
TAB_STAND_IN = "\ue009"

# A word with the blank before it; punctuation with a line's end and the next line's indentation; the rest.
CHUNK = re.compile(r"[^\S\n]?\w+|[^\S\n]?[^\s\w]*\n\s*|[^\S\n]?[^\s\w]+|\s+")
# Letters that mean something else to the trainer: our stand-ins, the space mark, its unknown mark, NUL.
UNTRAINABLE = re.compile(f"[{SPACE_STAND_IN}{TAB_STAND_IN}{SPACE_MARK}\u2585\0]")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_path: str | Path,
    max_bytes: int = 32_000_000,
    character_coverage: float = 0.9995,
    max_piece_length: int = 32,
) -> SentencePieceTokenizer:
    """Trains on `texts`, writes `out_path` (atomically) and returns the tokenizer.

    The result depends on the set of texts only, not on their order, and takes about 0.4 s per MB on one core.

    Args:
        texts: documents; read once.
        vocab_size: pieces in all, with 256 bytes, `<unk>` (0) and `<eod>` (1) among them.
        out_path: must end in `.model`.
        max_bytes: of a larger corpus, this many UTF-8 bytes of documents drawn by their hash are used.
        character_coverage: share of all characters that get a piece of their own; the rest is spelled in bytes.
        max_piece_length: characters of the longest piece.

    Raises:
        ConfigError: `out_path` does not end in `.model`, or `vocab_size` does not suit the corpus.
        DataError: no text at all.
    """
    out_path = Path(out_path)
    if out_path.suffix != ".model":
        raise ConfigError(f"--output {out_path}: a sentencepiece model's name ends in .model, e.g. tokenizer.model")
    sample = _sample_documents(texts, max_bytes)
    if not sample:
        raise DataError("--input: there is no text to train a tokenizer on; python-stdlib always works")
    model = _restore_stand_ins(_run_trainer(sample, vocab_size, character_coverage, max_piece_length))
    write_atomically(out_path, model)
    return SentencePieceTokenizer.load(out_path)


def _sample_documents(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The documents of smallest hash that fit in `max_bytes`, in the order of their hashes."""
    kept: list[tuple[int, str]] = []  # a heap with the largest hash on top
    size = 0
    for text in texts:
        text = text[: max(1, max_bytes // 4)]  # one huge document must not be the whole sample
        if not text:
            continue
        encoded = text.encode("utf-8", errors="replace")
        key = int.from_bytes(hashlib.blake2b(encoded, digest_size=16).digest(), "big")
        heapq.heappush(kept, (-key, text))
        size += len(encoded)
        while size > max_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[1].encode("utf-8", errors="replace"))
    return [text for _, text in sorted(kept, reverse=True)]


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for chunk in CHUNK.findall(document):
            if not UNTRAINABLE.search(chunk):
                yield chunk.replace(" ", SPACE_STAND_IN).replace("\t", TAB_STAND_IN)


def _run_trainer(documents: list[str], vocab_size: int, character_coverage: float, max_piece_length: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_chunks(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            max_sentencepiece_length=max_piece_length,
            required_chars=f"{SPACE_STAND_IN}{TAB_STAND_IN}\n",  # without them a space would be spelled as U+2581
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece="<eod>",
            num_threads=1,  # deterministic
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _trainer_error(str(error), vocab_size) from None
    return model.getvalue()


def _trainer_error(message: str, vocab_size: int) -> Exception:
    if high := re.search(r"value\s*<=\s*(\d+)", message):
        return ConfigError(f"--vocab-size {vocab_size}: this corpus gives no more than {high[1]} pieces; use {high[1]}")
    if low := re.search(r"smaller than required_chars\.?\s*\d+\s*vs\s*(\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size}: bytes and letters alone are {low[1]} pieces; use {low[1]} or more"
        )
    return TokenizerError(f"sentencepiece could not train on this corpus: {' '.join(message.split())[:200]}")


def _restore_stand_ins(model: bytes) -> bytes:
    """The serialized model with tabs and space marks in its pieces for their stand-ins.

    The format is protobuf, `sentencepiece_model.proto`: field 1 of ModelProto is a piece (repeated), field 1 of that
    its text.
    """
    spellings = ((SPACE_STAND_IN, SPACE_MARK), (TAB_STAND_IN, "\t"))

    def rename(text: bytes) -> bytes:
        for stand_in, character in spellings:
            text = text.replace(stand_in.encode(), character.encode())
        return text

    return _map_field_one(model, lambda piece: _map_field_one(piece, rename))


def _map_field_one(message: bytes, change) -> bytes:
    """A protobuf message with `change` (bytes to bytes) applied to every length-delimited field number 1."""
    out, position = bytearray(), 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        wire_type = key & 7
        if wire_type == 2:
            length, position = _read_varint(message, position)
            end = position + length
        elif wire_type == 0:
            _, end = _read_varint(message, position)
        else:
            end = position + {1: 8, 5: 4}[wire_type]
        if key == (1 << 3 | 2):
            content = change(message[position:end])
            out += b"\x0a" + _varint(len(content)) + content
        else:
            out += message[start:end]
        position = end
    return bytes(out)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
