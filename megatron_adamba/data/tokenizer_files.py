"""Tokenizers that other projects publish: Hugging Face `tokenizer.json` and tiktoken rank files."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adamba.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

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

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str, eod_id: int, content: bytes) -> None:
        self._tokenizer = tokenizer
        # Else "<|endoftext|>" written in a document would become the real one and cut the document in two.
        self._tokenizer.encode_special_tokens = True
        self.name = name
        self.eod_id = eod_id
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.hash = hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, path: Path, eod_token: str | None = None) -> HuggingFaceTokenizer:
        """Reads `path`. Raises TokenizerError: damaged, or none of the usual end-of-document tokens in it."""
        from tokenizers import Tokenizer

        try:
            content = path.read_bytes()
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            reason = _first_line(error)
            raise TokenizerError(f"--tokenizer {path}: not a Hugging Face tokenizer.json ({reason})") from None
        names = USUAL_EOD_TOKENS if eod_token is None else (eod_token,)
        ids = [tokenizer.token_to_id(name) for name in names]
        eod_id = next((token for token in ids if token is not None), None)
        if eod_id is None:
            raise TokenizerError(
                f"--tokenizer {path}: no end-of-document token among {', '.join(names)}; "
                "name one that its vocabulary holds with --eod-token"
            )
        name = path.parent.name if path.name == "tokenizer.json" and path.parent.name else path.stem
        return cls(tokenizer, name, eod_id, content)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        # The library drops unknown ids without a word.
        _check_range(kept, self.vocab_size, self.name)
        return self._tokenizer.decode(kept, skip_special_tokens=False)


class TiktokenTokenizer:
    """A byte-pair encoding in tiktoken's terms: ranks of byte strings and a splitting pattern."""

    def __init__(self, encoding: tiktoken.Encoding, ranks_digest: bytes, eod_id: int) -> None:
        self._encoding = encoding
        self.name = encoding.name
        self.eod_id = eod_id
        self.vocab_size = encoding.max_token_value + 1
        content = ranks_digest + encoding._pat_str.encode() + b"\0" + str(eod_id).encode()
        self.hash = hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, source: str) -> TiktokenTokenizer:
        """An encoding by name, or a file of ranks: a line is a base64 byte string, a space and its rank.

        A file does not hold the splitting pattern: it is chosen by the file's stem if that is the name of a
        published encoding, else cl100k_base's is taken, and the id after the last rank is end of document.

        Raises TokenizerError: unknown name, no network for it, or a damaged file.
        """
        import tiktoken

        path = Path(source)
        if not path.is_file():
            encoding = _published_encoding(source)
            return cls(encoding, _ranks_digest(encoding._mergeable_ranks), encoding.eot_token)
        ranks = _read_ranks(path)
        pattern, eod_id = _published_patterns().get(path.stem, (None, None))
        if pattern is None:
            pattern, eod_id = _published_patterns()["cl100k_base"][0], max(ranks.values()) + 1
        encoding = tiktoken.Encoding(
            path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eod_id}
        )
        return cls(encoding, _ranks_digest(ranks), eod_id)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids if token != self.eod_id]
        _check_range(kept, self.vocab_size, self.name)
        try:
            return self._encoding.decode(kept, errors="replace")
        except KeyError as error:
            raise TokenizerError(f"token id {error.args[0]} is a gap in the vocabulary of {self.name}") from None


def _published_encoding(name: str) -> tiktoken.Encoding:
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # a missing name, or whatever the download raises
        known = ", ".join(tiktoken.list_encoding_names())
        raise TokenizerError(
            f"--tokenizer tiktoken:{name}: no such file, and as a name it cannot be had ({_first_line(error)[:120]}); "
            f"give a local .tiktoken file, or, with a network, one of {known}"
        ) from None


def _published_patterns() -> dict[str, tuple[str, int]]:
    """Splitting pattern and end-of-document id of the encodings OpenAI published, which define those formats."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    lower, upper = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    cl100k = "|".join(
        (
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\n\p{L}\p{N}]?+\p{L}++",
            r"\p{N}{1,3}+",
            r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
            r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        )
    )
    o200k = "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contraction}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contraction}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    )
    return {
        "gpt2": (gpt2, 50256),
        "r50k_base": (gpt2, 50256),
        "cl100k_base": (cl100k, 100257),
        "o200k_base": (o200k, 199999),
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"--tokenizer tiktoken:{path}: line {number} is not a base64 byte string, a space and a rank"
            ) from None
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing or len(set(ranks.values())) != len(ranks):
        reason = f"{missing} of the 256 single bytes have no rank" if missing else "two byte strings share a rank"
        raise TokenizerError(f"--tokenizer tiktoken:{path}: {reason}; the file must hold a whole BPE vocabulary")
    return ranks


def _ranks_digest(ranks: dict[bytes, int]) -> bytes:
    digest = hashlib.sha256()
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(rank.to_bytes(8, "little") + len(piece).to_bytes(8, "little") + piece)
    return digest.digest()


def _check_range(ids: list[int], vocab_size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise TokenizerError(f"token id {token} is not in {name}: ids go from 0 to {vocab_size - 1}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
