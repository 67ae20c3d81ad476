"""Tokenizers: lossless, stable, and clear about what they cannot read."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from data_helpers import INDENTED, TABBED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_adamba.data.corpus import iterate_documents
from megatron_adamba.data.held_out import is_validation
from megatron_adamba.data.sentencepiece_training import train_sentencepiece
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.data.tokenizer_sentencepiece import SentencePieceTokenizer
from megatron_adamba.errors import ConfigError, DataError, TokenizerError

AWKWARD = st.text() | st.text(alphabet=" \t\n\r\u2581\u2585\ue020\ue009\0a<>ed0x41\u00e9\U0001f600", max_size=60)


def rank_file(folder: Path, name: str = "tiny.tiktoken", extra: tuple[bytes, ...] = (b"ab", b" the")) -> Path:
    pieces = [bytes([value]) for value in range(256)] + list(extra)
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def hugging_face_file(folder: Path, special: str = "<|endoftext|>") -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@settings(max_examples=300, deadline=None)
@given(text=AWKWARD)
@example(text="<eod><unk><0x41></s>")
@example(text=" \u2581 \u2581\u2581")
@example(text="\0\n\t  \t\n ")
def test_trained_sentencepiece_is_lossless(trained: SentencePieceTokenizer, text: str):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eod_id not in ids and all(0 <= token < trained.vocab_size for token in ids)
    assert trained.decode([*ids, trained.eod_id]) == text
    assert trained.encode_batch([text, "x"]) == [ids, trained.encode("x")]


@settings(max_examples=100, deadline=None)
@given(text=AWKWARD)
def test_bytes_are_lossless(text: str):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, 256]) == text


def test_bytes_of_a_cut_character_and_bad_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.decode([0xF0, 0x9F, 97]) == "\ufffda"
    with pytest.raises(TokenizerError, match="ids go from 0 to 256"):
        tokenizer.decode([257])


def test_pieces_hold_newlines_tabs_and_indentation(trained: SentencePieceTokenizer):
    pieces = [trained._processor.id_to_piece(token) for token in range(trained.vocab_size)]
    assert any(piece.endswith("\n" + "\u2581" * 8) for piece in pieces)
    assert any("\n\t\t" in piece for piece in pieces)
    assert len(trained.encode("\t")) == len(trained.encode("\n")) == 1
    for text in (TABBED, INDENTED):
        ids = trained.encode(text)
        assert not any(trained._processor.is_byte(token) for token in ids)
        assert len(text) / len(ids) > 3


def test_standard_library_at_4096_pieces(tmp_path: Path):
    documents = list(iterate_documents("python-stdlib"))
    started = time.perf_counter()
    training = [text for identity, text in documents if not is_validation(identity, 0.05)]
    tokenizer = train_sentencepiece(training, 4096, tmp_path / "stdlib.model", max_bytes=6_000_000)
    assert time.perf_counter() - started < 40
    held_out = [text for identity, text in documents if is_validation(identity, 0.05)]
    encoded = tokenizer.encode_batch(held_out)
    assert [tokenizer.decode(ids) for ids in encoded] == held_out
    assert sum(len(text.encode()) for text in held_out) / sum(map(len, encoded)) >= 3.4
    assert len(tokenizer.encode("\n        ")) == 1


def test_space_and_tab_have_pieces_even_where_the_corpus_has_none(tmp_path: Path):
    tokenizer = train_sentencepiece(["abcabcabd\n" * 50], 270, tmp_path / "bare.model")
    assert len(tokenizer.encode(" ")) == 1
    assert tokenizer.decode(tokenizer.encode(" a \t b ")) == " a \t b "


def test_training_depends_on_the_set_of_texts_only(tmp_path: Path):
    texts = [f"{INDENTED} {number} {TABBED}" for number in range(20)]
    first = train_sentencepiece(texts, 400, tmp_path / "a.model", max_bytes=3000)
    second = train_sentencepiece(reversed(texts), 400, tmp_path / "folder" / "b.model", max_bytes=3000)
    assert first.hash == second.hash == hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize(("size", "rule"), [(100_000, r"no more than \d+ pieces; use \d+"), (20, r"use \d+ or more")])
def test_vocabulary_that_does_not_suit_the_corpus(tmp_path: Path, size: int, rule: str):
    with pytest.raises(ConfigError, match=rule) as caught:
        train_sentencepiece([INDENTED], size, tmp_path / "x.model")
    named = int("".join(filter(str.isdigit, str(caught.value).split("; use ")[1])))
    assert train_sentencepiece([INDENTED], named, tmp_path / "x.model").vocab_size == named


def test_training_refusals(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ends in \.model"):
        train_sentencepiece(["a"], 300, tmp_path / "x.bin")
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", ""], 300, tmp_path / "x.model")
    assert list(tmp_path.iterdir()) == []


def test_hash_does_not_depend_on_the_path(model_path: Path, tmp_path: Path):
    copy = shutil.copy(model_path, tmp_path / "other.model")
    assert load_tokenizer(str(copy)).hash == load_tokenizer(str(model_path)).hash
    one = rank_file(tmp_path)
    (tmp_path / "deep").mkdir()
    ranks = lambda spec: load_tokenizer(spec, split_pattern="cl100k_base")
    assert ranks(f"tiktoken:{one}").hash == ranks(str(rank_file(tmp_path / "deep"))).hash
    other = rank_file(tmp_path, "more.tiktoken", (b"ab", b" then"))
    assert ranks(f"tiktoken:{other}").hash != ranks(f"tiktoken:{one}").hash


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_tiktoken_ranks_from_a_file(tmp_path_factory: pytest.TempPathFactory, text: str):
    tokenizer = load_tokenizer(f"tiktoken:{rank_file(tmp_path_factory.mktemp('ranks'))}", split_pattern="cl100k_base")
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (258, 259)
    assert tokenizer.decode([*tokenizer.encode(text), 258]) == text


def test_tiktoken_special_spellings_are_text_and_bad_ids_are_refused(tmp_path: Path):
    tokenizer = load_tokenizer(f"tiktoken:{rank_file(tmp_path)}", split_pattern="cl100k_base")
    ids = tokenizer.encode("a<|endoftext|>b the")
    assert tokenizer.eod_id not in ids and 257 in ids
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    with pytest.raises(TokenizerError, match="ids go from 0 to 258"):
        tokenizer.decode([259])


def test_hugging_face_file_and_folder(tmp_path: Path):
    path = hugging_face_file(tmp_path / "model")
    tokenizer = load_tokenizer(str(path))
    assert load_tokenizer(str(path.parent)).hash == tokenizer.hash
    assert (tokenizer.name, tokenizer.eod_id, tokenizer.vocab_size) == ("model", 256, 257)
    text = "  x<|endoftext|>\n\t\u00e9\U0001f600"
    assert tokenizer.eod_id not in tokenizer.encode(text)
    assert tokenizer.decode([*tokenizer.encode(text), 256]) == text
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]
    with pytest.raises(TokenizerError, match="ids go from 0 to 256"):
        tokenizer.decode([257])


def test_hugging_face_end_of_document_by_name(tmp_path: Path):
    path = hugging_face_file(tmp_path / "odd", special="<|halt|>")
    with pytest.raises(TokenizerError, match="--eod-token"):
        load_tokenizer(str(path))
    assert load_tokenizer(str(path), eod_token="<|halt|>").eod_id == 256


def test_sentencepiece_end_of_document_by_name(model_path: Path):
    assert load_tokenizer(str(model_path), eod_token="<eod>").eod_id == 1
    with pytest.raises(TokenizerError, match="--eod-token"):
        load_tokenizer(str(model_path), eod_token="<nothing>")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\x03abc", b"{}", b"\x00" * 40])
@pytest.mark.parametrize("name", ["x.model", "tokenizer.json", "x.tiktoken"])
def test_files_that_are_no_tokenizer(tmp_path: Path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_model_is_refused(model_path: Path, tmp_path: Path):
    path = tmp_path / "cut.model"
    path.write_bytes(model_path.read_bytes()[:-7])
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("spec", ["missing.model", "missing", "tiktoken:no_such_encoding", "."])
def test_specs_that_name_nothing(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(spec)
    assert spec in str(caught.value) and "\n" not in str(caught.value)


def test_eod_token_where_it_is_fixed(tmp_path: Path):
    with pytest.raises(TokenizerError, match="leave --eod-token out"):
        load_tokenizer("bytes", eod_token="<eod>")
    path = tmp_path / "vocab.txt"
    path.write_text(json.dumps({}))
    with pytest.raises(TokenizerError, match="ending"):
        load_tokenizer(str(path))
