"""Byte-pair encodings in tiktoken's terms: published names, and files of ranks with what lies beside them."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.config.root import TOKENIZER_NOTE
from megatron_adamba.data.rank_encodings import END_OF_TEXT, RankEncoding, encoding_of_pattern, published_encodings
from megatron_adamba.data.tokenizer_options import (
    LARGEST_FILE,
    MOST_IDS,
    PROBE,
    TOOL_FLAGS,
    TokenizerFlags,
    TokenizerNote,
    check_range,
    clean_text,
    first_line,
    library_failures,
)
from megatron_adamba.errors import TokenizerError
from megatron_adamba.schema import read_regular

if TYPE_CHECKING:
    import tiktoken

CARRIED_NAME = "tokenizer.tiktoken"
LARGEST_PATTERN = 10_000
"""characters"""


@dataclass(frozen=True)
class RankChoice:
    """What chooses the encoding of a file of ranks, beside its name and the note that lies beside it."""

    eod_token: str | None = None
    split_pattern: str | None = None
    """wins over everything"""
    usual_pattern: str | None = None
    """where nothing else says one: that of the model's makers"""


class TiktokenTokenizer:
    """Ranks of byte strings and a splitting pattern."""

    def __init__(self, encoding: tiktoken.Encoding, eod_token: str) -> None:
        """Args: eod_token: one of the encoding's special tokens."""
        self._encoding = encoding
        self._eod_token = eod_token
        self.name = encoding.name
        self.eod_id: int = encoding._special_tokens[eod_token]
        self.vocab_size = encoding.max_token_value + 1
        # No text becomes a special token, so what others there are makes no difference to data.
        content = _ranks_digest(encoding._mergeable_ranks) + encoding._pat_str.encode() + b"\0%d" % self.eod_id
        self.hash = hashlib.sha256(content).hexdigest()

    @classmethod
    def published(
        cls,
        name: str,
        choice: RankChoice = RankChoice(),
        flags: TokenizerFlags = TOOL_FLAGS,
        network: bool = False,
    ) -> TiktokenTokenizer:
        """An encoding by name, downloaded where tiktoken has not kept it. Raises TokenizerError, also where that is
        not allowed."""
        if choice.split_pattern is not None:
            raise TokenizerError(
                f"{flags.tokenizer} tiktoken:{name}: its splitting pattern is known; leave {flags.split_pattern} out"
            )
        encoding = _published_encoding(name, flags, network)
        where = f"{flags.tokenizer} tiktoken:{name}"
        _check_special(choice.eod_token or END_OF_TEXT, encoding._special_tokens, where, flags)
        return cls(encoding, choice.eod_token or END_OF_TEXT)

    @classmethod
    def load(
        cls, path: Path, choice: RankChoice = RankChoice(), flags: TokenizerFlags = TOOL_FLAGS
    ) -> TiktokenTokenizer:
        """A file of ranks: a line is a base64 byte string, a space and its rank.

        The file does not hold the splitting pattern. It comes from `choice`, the note beside the file, or the file's
        stem if that is the name of a published encoding, in this order.

        Raises TokenizerError: a damaged file, or nothing says how its text is split.
        """
        import tiktoken

        where = f"{flags.tokenizer} tiktoken:{path}"
        ranks, note = read_ranks(path, where), TokenizerNote.beside(path)
        chosen = _choose(path, ranks, note, choice, flags, where)
        _check_special(chosen.eod_token, chosen.special_tokens, where, flags)
        if len(chosen.pattern) > LARGEST_PATTERN:
            raise TokenizerError(
                f"{where}: its splitting pattern has more than {LARGEST_PATTERN} characters; shorten it"
            )
        clash = sorted(set(chosen.special_tokens.values()) & set(ranks.values()))
        if clash:
            raise TokenizerError(
                f"{where}: id {clash[0]} is a rank's and a special token's; is it of another encoding? Name that with "
                f"{flags.split_pattern}"
            )
        name = note.name or path.stem
        with library_failures(f"{where}: cannot be used ({{reason}}); {flags.split_pattern} may be no expression"):
            encoding = tiktoken.Encoding(
                name, pat_str=chosen.pattern, mergeable_ranks=ranks, special_tokens=chosen.special_tokens
            )
            loaded = cls(encoding, chosen.eod_token)
            whole = loaded.decode(loaded.encode(PROBE)) == PROBE
        if not whole:
            raise TokenizerError(
                f"{where}: its splitting pattern leaves characters out; give one that matches all text with "
                f"{flags.split_pattern}, for example cl100k_base"
            )
        return loaded

    def carried(self) -> dict[str, bytes]:
        ranks = sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in ranks)
        note = TokenizerNote(self._eod_token, self._encoding._pat_str, dict(self._encoding._special_tokens), self.name)
        return {CARRIED_NAME: lines, CARRIED_NAME + TOKENIZER_NOTE: note.content()}

    def encode(self, text: str) -> list[int]:
        with self._failures():
            return self._encoding.encode_ordinary(clean_text(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        check_range(kept, self.vocab_size, self.name)
        try:
            return self._encoding.decode(kept, errors="replace")
        except KeyError as error:
            raise TokenizerError(f"token id {error.args[0]} is a gap in the vocabulary of {self.name}") from None

    def _failures(self):
        return library_failures(f"tokenizer {self.name}: its library failed ({{reason}}); the pattern may be at fault")


def _choose(
    path: Path,
    ranks: dict[bytes, int],
    note: TokenizerNote,
    choice: RankChoice,
    flags: TokenizerFlags,
    where: str,
) -> RankEncoding:
    known = published_encodings()
    if choice.split_pattern is not None:
        found = encoding_of_pattern(choice.split_pattern, ranks.values(), flags.split_pattern)
    elif note.split_pattern is not None:
        found = encoding_of_pattern(note.split_pattern, ranks.values(), f"{path}.meta.json: split_pattern")
    elif path.stem in known:
        found = known[path.stem].of(ranks.values())
    elif choice.usual_pattern is not None:
        found = encoding_of_pattern(choice.usual_pattern, ranks.values(), flags.split_pattern)
    else:
        raise TokenizerError(
            f"{where}: a file of ranks does not say how text is split, and {path.stem} is no published encoding; name "
            f"the one that it was made with ({', '.join(known)}), or its regular expression, with {flags.split_pattern}"
        )
    special, eod_token = note.special_tokens or found.special_tokens, choice.eod_token or note.eod_token
    if eod_token is None:
        eod_token = found.eod_token if found.eod_token in special else next(iter(special))
    return RankEncoding(found.pattern, special, eod_token)


def _check_special(token: str, special_tokens: dict[str, int], where: str, flags: TokenizerFlags) -> None:
    if token not in special_tokens:
        names = ", ".join(list(special_tokens)[:12])
        raise TokenizerError(
            f"{where}: no special token {token} ({names}); name one of these with {flags.eod_token}, or list its own "
            f"as `special_tokens` in a FILE.meta.json beside it"
        )


def _published_encoding(name: str, flags: TokenizerFlags, network: bool) -> tiktoken.Encoding:
    import tiktoken

    known = tiktoken.list_encoding_names()
    what = f"{flags.tokenizer} tiktoken:{name}: no such file, and as a name it cannot be had"
    advice = f"give a local .tiktoken file, or, with a network, one of {', '.join(known)}"
    if name not in known:
        raise TokenizerError(f"{what}; {advice}")
    if not network:
        raise TokenizerError(
            f"{flags.tokenizer} tiktoken:{name}: would have to be downloaded, which is done for a name that you give "
            f"yourself alone; put its ranks there as {CARRIED_NAME}, with a note of its name ({name}) as "
            f"`split_pattern` in {CARRIED_NAME}{TOKENIZER_NOTE}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the download raises
        raise TokenizerError(f"{what} ({first_line(error)[:120]}); {advice}") from None


def read_ranks(path: Path, where: str) -> dict[bytes, int]:
    """{byte string: rank}. Raises TokenizerError: not such a file, or not a whole vocabulary."""
    content = read_regular(path, TokenizerError, "give a file of BPE ranks", LARGEST_FILE)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            piece = base64.b64decode(piece, validate=True)
            if len(rank) > 8 or not rank.isdigit() or int(rank) >= MOST_IDS or piece in ranks or not piece:
                raise ValueError
            ranks[piece] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{where}: line {number} is not a base64 byte string of its own, a space and a rank below {MOST_IDS}"
            ) from None
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing or len(set(ranks.values())) != len(ranks):
        reason = f"{missing} of the 256 single bytes have no rank" if missing else "two byte strings share a rank"
        raise TokenizerError(f"{where}: {reason}; the file must hold a whole BPE vocabulary")
    return ranks


def _ranks_digest(ranks: dict[bytes, int]) -> bytes:
    digest = hashlib.sha256()
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(rank.to_bytes(8, "little") + len(piece).to_bytes(8, "little") + piece)
    return digest.digest()
