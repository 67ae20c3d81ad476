"""A model that cannot see special tokens in text, where a tokenizer.json holds them among its ordinary pieces."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN = "\0unknown\0"
"""the new name of a hidden piece for what is unknown: a text that spells it is unknown too"""


def hide_special_pieces(tokenizer: tokenizers.Tokenizer, eod_token: str) -> None:
    """Changes the model in place so that no text becomes the end of a document, or a special token that it spells.

    The library's own switch for this, `encode_special_tokens`, only stops the search for added tokens: a model that
    holds "</s>" itself, or merges that make it, still finds it. Here the ids stay and the added tokens keep their
    names, for decoding; what a special token was spelled by is then encoded by other pieces.

    Raises ValueError where what is unknown becomes the end of a document.
    """
    from tokenizers import AddedToken

    names = _hidden_names(tokenizer, eod_token)
    if not any(tokenizer.model.token_to_id(name) is not None for name in names):
        return
    model = json.loads(tokenizer.to_str())["model"]
    unknown = _unknown_piece(model)
    if unknown == eod_token and not _knows_all_bytes(tokenizer, model):
        raise ValueError(f"{eod_token} stands for unknown characters, too, and would end documents at each")
    if unknown is not None and len(unknown) > 1:
        names.add(unknown)
    held = [name for name in sorted(names) if tokenizer.model.token_to_id(name) is not None]
    # decoding finds the names of added tokens
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in held])
    _HIDE[model["type"]](model, names)
    tokenizer.model = type(tokenizer).from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model})).model


def _hidden_names(tokenizer: tokenizers.Tokenizer, eod_token: str) -> set[str]:
    """All pieces with the end's id, and other special tokens that are spelled, not what text is made of."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    spelled = {name for name in special if len(name) > 1 and not _BYTE_PIECE.fullmatch(name)}
    end = tokenizer.token_to_id(eod_token)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return spelled | {eod_token} | {name for name, token in vocabulary.items() if token == end}


def _unknown_piece(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"]


def _knows_all_bytes(tokenizer: tokenizers.Tokenizer, model: dict[str, Any]) -> bool:
    """Whether nothing is unknown to it: bytes as letters, each with an id, wherever in a word it stands."""
    from tokenizers import pre_tokenizers

    before, behind = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    forms = {(front, end) for front in {"", before} for end in {"", behind}}
    letters = pre_tokenizers.ByteLevel.alphabet()
    names = (f"{front}{letter}{end}" for letter in letters for front, end in forms)
    return all(tokenizer.model.token_to_id(name) is not None for name in names)


def _hide_in_scores(model: dict[str, Any], names: set[str]) -> None:
    """Unigram: ids are places in a list, and no part of a text is empty."""
    model["vocab"] = [["" if piece in names else piece, score] for piece, score in model["vocab"]]


def _hide_in_words(model: dict[str, Any], names: set[str]) -> None:
    """WordLevel and WordPiece: words that are looked up."""
    vocabulary, unknown = model["vocab"], model["unk_token"]
    if unknown in names and unknown in vocabulary:
        model["unk_token"], vocabulary[_UNKNOWN] = _UNKNOWN, vocabulary[unknown]
    model["vocab"] = {piece: token for piece, token in vocabulary.items() if piece not in names}


def _hide_in_merges(model: dict[str, Any], names: set[str]) -> None:
    """BPE: letters, and what pairs are merged to."""
    _hide_in_words(model, names)
    prefix = len(model["continuing_subword_prefix"] or "")
    merged = lambda pair: (*pair, pair[0] + pair[1][prefix:])
    model["merges"] = [pair for pair in model["merges"] if names.isdisjoint(merged(pair))]


_HIDE = {
    "Unigram": _hide_in_scores,
    "WordLevel": _hide_in_words,
    "WordPiece": _hide_in_words,
    "BPE": _hide_in_merges,
}
