"""Files of BPE ranks are split as those split text who made them, or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from megatron_adamba.data.rank_encodings import published_encodings
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import TokenizerError

OF_NANOCHAT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""as nanochat's tokenizer.py writes it"""
TEXT = "In 2024, it's 12345 DON'T\n\n  x+=1;  \t\u00e9t\u00e9's \u0661\u0662\u0663  "
DIGITS = tuple(piece for size in (2, 3, 4) for piece in (b"2024"[:size], b"12345"[:size]))


def rank_file(folder: Path, name: str, extra: tuple[bytes, ...] = DIGITS) -> Path:
    pieces = [bytes([value]) for value in range(256)] + list(extra)
    path = folder / name
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)))
    return path


def split(pattern: str, text: str) -> list[str]:
    """By a library that is not tiktoken's."""
    import regex

    return [found[0] for found in regex.finditer(pattern, text)]


def spelled(tokenizer, text: str) -> list[bytes]:
    return [tokenizer._encoding.decode_single_token_bytes(token) for token in tokenizer.encode(text)]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", ["gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony"]
)
def test_published_encodings_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch):
    from tiktoken_ext import openai_public as published

    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(published, loader, lambda *_, **__: {})
    definition = published.ENCODING_CONSTRUCTORS[name]()
    ours = published_encodings()[name]
    assert (ours.pattern, ours.special_tokens) == (definition["pat_str"], definition["special_tokens"])


def test_names_of_published_encodings_choose_pattern_and_special_tokens(tmp_path: Path):
    expected = {"p50k_base": (50256, 50257), "cl100k_base": (100257, 100277), "o200k_harmony": (199999, 201088)}
    for name, (eod_id, vocab_size) in expected.items():
        tokenizer = load_tokenizer(str(rank_file(tmp_path, f"{name}.tiktoken")))
        assert (tokenizer.eod_id, tokenizer.vocab_size) == (eod_id, vocab_size)
        with pytest.raises(TokenizerError, match="gap"):
            tokenizer.decode([5000])
        pieces = split(published_encodings()[name].pattern, TEXT)
        assert spelled(tokenizer, TEXT) == [found for piece in pieces for found in spelled(tokenizer, piece)]
    assert spelled(load_tokenizer(str(tmp_path / "p50k_base.tiktoken")), "2024") == [b"2024"]
    assert spelled(load_tokenizer(str(tmp_path / "cl100k_base.tiktoken")), "2024") == [b"202", b"4"]
    assert load_tokenizer(str(tmp_path / "o200k_harmony.tiktoken"), eod_token="<|return|>").eod_id == 200002


def test_an_unknown_rank_file_is_refused_without_a_pattern(tmp_path: Path):
    path = rank_file(tmp_path, "mine.tiktoken")
    for spec in (str(path), f"tiktoken:{path}"):
        with pytest.raises(TokenizerError, match=r"--split-pattern") as caught:
            load_tokenizer(spec)
        assert "nanochat" in str(caught.value) and str(path) in str(caught.value)


def test_a_pattern_by_name_or_as_an_expression(tmp_path: Path):
    path = rank_file(tmp_path, "mine.tiktoken")
    last = 256 + len(DIGITS)
    named = load_tokenizer(str(path), split_pattern="nanochat")
    assert (named.eod_id, named.vocab_size) == (last, last + 9)
    assert spelled(named, "2024") == [b"20", b"2", b"4"]
    pieces = split(OF_NANOCHAT, TEXT)
    assert "".join(pieces) == TEXT
    assert spelled(named, TEXT) == [found for piece in pieces for found in spelled(named, piece)]
    given = load_tokenizer(str(path), split_pattern=OF_NANOCHAT)
    assert given.encode(TEXT) == named.encode(TEXT) and given.hash == named.hash
    whole = load_tokenizer(str(path), split_pattern="p50k_base")
    assert spelled(whole, "2024") == [b"2024"] and whole.eod_id == last and whole.hash != named.hash


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("cl100k", "for example cl100k_base"),
        ("", "no known encoding"),
        ("(?:", "cannot be used"),
        (r"\w+", "leaves characters out"),
        ("a" * 20_000 + "+", "characters"),
    ],
)
def test_patterns_that_are_none(tmp_path: Path, pattern: str, words: str):
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(str(rank_file(tmp_path, "mine.tiktoken")), split_pattern=pattern)


def test_what_a_file_cannot_say_may_lie_beside_it(tmp_path: Path):
    path = rank_file(tmp_path, "mine.tiktoken")
    note = {"split_pattern": "o200k_base", "special_tokens": {"<|a|>": 400, "<|b|>": 300}, "eod_token": "<|b|>"}
    (tmp_path / "mine.tiktoken.meta.json").write_text(json.dumps(note))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eod_id, tokenizer.vocab_size, tokenizer.decode([400])) == (300, 401, "<|a|>")
    assert load_tokenizer(str(path), eod_token="<|a|>").eod_id == 400
    (tmp_path / "mine.tiktoken.meta.json").write_text(json.dumps(note | {"special_tokens": {"<|b|>": 97}}))
    with pytest.raises(TokenizerError, match="id 97 is a rank's and a special token's"):
        load_tokenizer(str(path))


def test_every_kind_carries_itself(tmp_path: Path, model_path: Path):
    from test_tokenizers import hugging_face_file

    odd = hugging_face_file(tmp_path / "odd", special="<|halt|>")
    ranks = rank_file(tmp_path, "mine.tiktoken")
    for place, tokenizer in enumerate(
        (
            load_tokenizer(str(odd), eod_token="<|halt|>"),
            load_tokenizer(str(model_path)),
            load_tokenizer(str(model_path), eod_token="<unk>"),
            load_tokenizer(str(ranks), split_pattern="nanochat"),
        )
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        for name, content in tokenizer.carried().items():
            (folder / name).write_bytes(content)
        again = load_tokenizer(str(folder))
        assert (again.hash, again.eod_id, again.vocab_size) == (tokenizer.hash, tokenizer.eod_id, tokenizer.vocab_size)
        assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.carried() == tokenizer.carried()
    assert load_tokenizer("bytes").carried() == {}
    assert load_tokenizer(str(model_path), eod_token="<unk>").hash != load_tokenizer(str(model_path)).hash


def test_no_name_that_a_folder_brings_starts_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import socket

    def refuse(*_: object, **__: object):
        raise AssertionError("reached for the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    hostile = (
        "tiktoken:gpt2",
        "tiktoken:https://example.com/x",
        "https://example.com/tokenizer.json",
        "gpt2",
        "a\0b",
        "",
    )
    for spec in (*hostile, "tiktoken:", "x" * 5000, "tiktoken:" + "x" * 5000, "tiktoken:../" * 300):
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(spec)
        assert "\n" not in str(caught.value)
