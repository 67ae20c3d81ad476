"""A model's tokenizer and end tokens as transformers finds them: AutoTokenizer, and `generate`'s settings."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adamba.config.root import find_tokenizer
from megatron_adamba.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_adamba.data.tokenizer_options import library_failures
from megatron_adamba.data.tokenizer_sentencepiece import SPACE_MARK
from megatron_adamba.data.tokenizer_tiktoken import TiktokenTokenizer
from megatron_adamba.surgery.canonical_source import CanonicalSource
from megatron_adamba.surgery.end_tokens import GENERATION_FILE, TOKENIZER_CONFIG_FILE
from megatron_adamba.surgery.split_pattern import for_tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


@dataclass(frozen=True)
class PublishedText:
    """What a folder of transformers says of text."""

    settings: dict[str, Any]
    """bos_token_id and eos_token_id, for config.json"""
    files: dict[str, bytes]
    """by name"""


def published_text(source: CanonicalSource) -> PublishedText:
    """Prompts begin behind the end-of-document token, and texts end where the model's end. Raises TokenizerError."""
    folder = source.opened.folder
    spec = find_tokenizer(folder)
    listed = source.config.end_tokens
    if spec is None:
        settings = _settings(None, listed)
        return PublishedText(settings, _generation(settings, listed))
    tokenizer = load_tokenizer(spec)
    settings = _settings(tokenizer.eod_id, [tokenizer.eod_id] if listed is None else listed)
    return PublishedText(settings, {**_tokenizer_files(spec, tokenizer, settings), **_generation(settings, listed)})


def _settings(bos: int | None, ends: list[int] | None) -> dict[str, Any]:
    # transformers' `generate` fails at an empty list
    one_or_all = ends[0] if ends and len(ends) == 1 else ends or None
    return {"bos_token_id": bos, "eos_token_id": one_or_all, "pad_token_id": None}


def _generation(settings: dict[str, Any], ends: list[int] | None) -> dict[str, bytes]:
    known = {name: value for name, value in settings.items() if value is not None}
    if ends is not None:
        known["eos_token_id"] = settings["eos_token_id"]
    return {GENERATION_FILE: _json(known)} if known else {}


def _tokenizer_files(spec: str, tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, bytes]:
    path = Path(spec.removeprefix("tiktoken:"))
    if path.is_dir():
        path = next(path / name for name in (_JSON, _SENTENCEPIECE) if (path / name).is_file())
    ends = settings["eos_token_id"]
    end = ends if isinstance(ends, int) else ends[0] if ends else tokenizer.eod_id
    if path.suffix == ".model" and path.is_file():
        return _of_sentencepiece(path, tokenizer, end)
    if isinstance(tokenizer, ByteTokenizer):
        made = _byte_pairs({}, None)
        made.add_special_tokens([END_OF_DOCUMENT])
    elif isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer._encoding
        made = _byte_pairs(encoding._mergeable_ranks, encoding._pat_str)
        _add_specials(made, {token: encoding.decode([token]) for token in encoding._special_tokens.values()})
    else:
        from tokenizers import Tokenizer as Library

        content = path.read_bytes()
        return {_JSON: content, **_config("PreTrainedTokenizerFast", Library.from_buffer(content), tokenizer, end)}
    return {_JSON: made.to_str().encode(), **_config("PreTrainedTokenizerFast", made, tokenizer, end)}


def _config(kind: str, made: Any, tokenizer: Tokenizer, end: int, **more: Any) -> dict[str, bytes]:
    """made: what has `id_to_token`."""
    values = {
        "tokenizer_class": kind,
        "bos_token": made.id_to_token(tokenizer.eod_id),
        "eos_token": made.id_to_token(end),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **more,
    }
    return {TOKENIZER_CONFIG_FILE: _json({name: value for name, value in values.items() if value is not None})}


def _of_sentencepiece(path: Path, tokenizer: Tokenizer, end: int) -> dict[str, bytes]:
    """LlamaTokenizer is transformers' reader of byte-pair models of this kind."""
    from sentencepiece import SentencePieceProcessor

    content = path.read_bytes()
    processor = SentencePieceProcessor(model_proto=content)
    pieces = _Pieces(processor)
    more = {
        "unk_token": pieces.id_to_token(processor.unk_id()),
        "add_prefix_space": processor.id_to_piece(processor.encode("a"))[0].startswith(SPACE_MARK),
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
    }
    return {_SENTENCEPIECE: content, **_config("LlamaTokenizer", pieces, tokenizer, end, **more)}


@dataclass(frozen=True)
class _Pieces:
    processor: Any

    def id_to_token(self, token: int) -> str | None:
        return self.processor.id_to_piece(token) if 0 <= token < self.processor.get_piece_size() else None


def _byte_pairs(ranks: dict[bytes, int], pattern: str | None) -> Any:
    """A byte-pair encoding as the tokenizers library has it. ranks: of byte strings, which are the ids too; none: the
    256 bytes are the vocabulary. pattern: cuts the text before; TokenizerError where the library cannot do as it says.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    spelled = _byte_letters()
    ranks = ranks or {bytes([value]): value for value in range(256)}
    spell = lambda piece: "".join(spelled[value] for value in piece)
    merges = [(spell(first), spell(second)) for first, second in _merges(ranks)]
    vocabulary = {spell(piece): rank for piece, rank in ranks.items()}
    made = Library(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern is not None:
        advice = "give the model's tokenizer one without it, for example that of cl100k_base"
        with library_failures(f"its splitting pattern has {{reason}}, which transformers has no word for; {advice}"):
            steps.insert(0, pre_tokenizers.Split(Regex(for_tokenizers(pattern)), behavior="isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each longer piece, by rank: what merging with smaller ranks alone leaves of it."""
    pairs = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1 and len(parts := _parts(piece, ranks, rank)) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _parts(piece: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [bytes([value]) for value in piece]
    while len(parts) > 1:
        pairs = enumerate(itertools.pairwise(parts))
        rank, place = min((ranks.get(first + second, limit), place) for place, (first, second) in pairs)
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _add_specials(made: Any, names: dict[int, str]) -> None:
    """At their ids: gaps below them get names of their own, as the library numbers on from the last."""
    for token in range(made.get_vocab_size(), max(names, default=-1) + 1):
        made.add_special_tokens([names.get(token, f"<|unused_{token}|>")])


def _byte_letters() -> list[str]:
    """How byte-level vocabularies spell each byte: printable ones as themselves, the others from U+0100 on
    (github.com/openai/gpt-2, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return [chr(value) if value in printable else chr(0x100 + others.index(value)) for value in range(256)]


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
