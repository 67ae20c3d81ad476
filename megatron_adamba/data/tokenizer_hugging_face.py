"""Hugging Face's `tokenizer.json`, of which the vocabulary counts and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adamba.config.root import TOKENIZER_NOTE
from megatron_adamba.data.tokenizer_growth import MOST_GROWTH, growth
from megatron_adamba.data.tokenizer_hidden import hide_special_pieces
from megatron_adamba.data.tokenizer_options import (
    LARGEST_FILE,
    MOST_IDS,
    PROBE,
    TOOL_FLAGS,
    TokenizerFlags,
    TokenizerNote,
    check_range,
    clean_text,
    library_failures,
)
from megatron_adamba.errors import TokenizerError
from megatron_adamba.schema import read_regular

if TYPE_CHECKING:
    import tokenizers

CARRIED_NAME = "tokenizer.json"
USUAL_EOD_TOKENS = (
    "<|endoftext|>",
    "<eod>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|bos|>",
    "<|return|>",
    "[EOD]",
    "[SEP]",
)


class HuggingFaceTokenizer:
    """A `tokenizer.json` in the format of the Hugging Face `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str, eod_token: str, content: bytes) -> None:
        self.name = name
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.eod_id = vocabulary[eod_token]
        self.vocab_size = max(vocabulary.values()) + 1
        self._tokenizer = keep_vocabulary_alone(tokenizer, eod_token)
        self._content = content
        self._chosen = eod_token if eod_token != _usual_eod_token(tokenizer) else None
        # another end of document makes it another tokenizer
        mark = b"" if self._chosen is None else b"\0eod %d" % self.eod_id
        self.hash = hashlib.sha256(content + mark).hexdigest()

    @classmethod
    def load(cls, path: Path, eod_token: str | None = None, flags: TokenizerFlags = TOOL_FLAGS) -> HuggingFaceTokenizer:
        """Reads `path`. Raises TokenizerError: damaged, or none of the usual end-of-document tokens in it."""
        from tokenizers import Tokenizer

        where = f"{flags.tokenizer} {path}"
        content = read_regular(path, TokenizerError, f"give a file for {flags.tokenizer}", LARGEST_FILE)
        note = TokenizerNote.beside(path)
        with library_failures(f"{where}: not a Hugging Face tokenizer.json ({{reason}})"):
            values = json.loads(content)
            _check_growth(values, where)
            tokenizer = Tokenizer.from_buffer(content)
            content = _normal_content(tokenizer, values.get("post_processor"))
            largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < MOST_IDS:
            raise TokenizerError(f"{where}: its largest id is {largest}; ids from 0 to {MOST_IDS - 1} are read")
        wanted = eod_token or note.eod_token
        found = wanted if wanted and tokenizer.token_to_id(wanted) is not None else None
        if wanted is None:
            found = _usual_eod_token(tokenizer)
        if found is None:
            names = (wanted,) if wanted else USUAL_EOD_TOKENS
            raise TokenizerError(
                f"{where}: no end-of-document token among {', '.join(names)}; "
                f"name one that its vocabulary holds with {flags.eod_token}"
            )
        name = path.parent.name if path.name == CARRIED_NAME and path.parent.name else path.stem
        with library_failures(f"{where}: cannot be used ({{reason}})"):
            loaded = cls(tokenizer, name, found, content)
            loaded.decode(loaded.encode(PROBE))
        return loaded

    def carried(self) -> dict[str, bytes]:
        files = {CARRIED_NAME: self._content}
        if self._chosen is not None:
            note = TokenizerNote(eod_token=self._chosen)
            files[CARRIED_NAME + TOKENIZER_NOTE] = note.content()
        return files

    def encode(self, text: str) -> list[int]:
        with self._failures():
            return self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._failures():
            found = self._tokenizer.encode_batch([clean_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        # The library drops unknown ids without a word.
        check_range(kept, self.vocab_size, self.name)
        with self._failures():
            return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _failures(self):
        return library_failures(f"tokenizer {self.name}: its library failed ({{reason}}); the file may be damaged")


def keep_vocabulary_alone(tokenizer: tokenizers.Tokenizer, eod_token: str) -> tokenizers.Tokenizer:
    """Takes from a foreign tokenizer, in place, whatever makes its ids depend on more than vocabulary and text.

    `transformers` saves its last call's truncation and padding with it; a file may also hold dropout, which draws
    merges at random, and a post-processor that adds tokens where we add our own. Normalizer, pre-tokenizer and
    decoder belong to the vocabulary and stay.
    """
    from tokenizers import AddedToken

    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    # Else "<|endoftext|>" written in a document would become the real one and cut the document in two; a file may
    # have it among its plain added tokens, which no switch turns off.
    tokenizer.add_special_tokens([AddedToken(eod_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    hide_special_pieces(tokenizer, eod_token)
    return tokenizer


def _check_growth(values: Any, where: str) -> None:
    """Raises TokenizerError before the library runs what would take all memory: it does so as it reads a file, too."""
    found = growth(values) if isinstance(values, dict) else 1
    if found > MOST_GROWTH:
        raise TokenizerError(
            f"{where}: its normalizer, pre-tokenizer and decoder may make a text {found:.3g} times as long; up to "
            f"{MOST_GROWTH} are read; shorten what its Replace and Prepend steps write"
        )


def _normal_content(tokenizer: tokenizers.Tokenizer, added: dict[str, Any] | None) -> bytes:
    """The file as the library writes it, so that one tokenizer has one hash however it was saved.

    Without the truncation and padding of somebody's last call, and without the post-processor (`added`) that
    `transformers` puts where there is none, which adds nothing. Others stay in, as in the hashes that there are.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if added and added.get("type") == "TemplateProcessing" and not added.get("special_tokens"):
        tokenizer.post_processor = None
    return tokenizer.to_str(pretty=True).encode()


def _usual_eod_token(tokenizer: tokenizers.Tokenizer) -> str | None:
    return next((name for name in USUAL_EOD_TOKENS if tokenizer.token_to_id(name) is not None), None)
