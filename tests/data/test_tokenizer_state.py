"""Of a foreign tokenizer file the vocabulary counts, and nothing else that the file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import INDENTED
from test_tokenizers import hugging_face_file

from megatron_adamba.data.tokenizer import load_tokenizer

LONG = INDENTED * 30


def edited(path: Path, **changes: object) -> Path:
    """A tokenizer.json with other values at its top level (`model` is merged)."""
    values = json.loads(path.read_text())
    values["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(values | changes))
    return path


@pytest.mark.oracle
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_call_of_transformers_leaves_no_trace(tmp_path: Path, padding_side: str):
    import transformers

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hugging_face_file(tmp_path / "made")), pad_token="<|endoftext|>", padding_side=padding_side
    )
    whole = fast(LONG, add_special_tokens=False)["input_ids"]
    fast("one call", truncation=True, padding="max_length", max_length=17)
    fast.save_pretrained(tmp_path / "saved")
    held = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert held["truncation"]["max_length"] == 17 and held["padding"]
    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer.encode(LONG) == whole and len(whole) > 1000
    assert tokenizer.encode_batch([LONG, "x"]) == [whole, tokenizer.encode("x")]
    assert len(tokenizer.encode("x")) == 1


def test_dropout_draws_no_merge(tmp_path: Path):
    merges = {"merges": [["t", "o"], ["to", "t"], ["a", "l"], ["tot", "al"]], "dropout": 0.7}
    path = hugging_face_file(tmp_path / "drop")
    letters = json.loads(path.read_text())["model"]["vocab"]
    vocab = letters | {piece: 300 + place for place, piece in enumerate(("to", "tot", "al", "total"))}
    tokenizer = load_tokenizer(str(edited(path, model=merges | {"vocab": vocab})))
    assert {tuple(tokenizer.encode("total")) for _ in range(30)} == {(303,)}


def test_post_processors_add_nothing(tmp_path: Path):
    from tokenizers import Tokenizer, processors

    path = hugging_face_file(tmp_path / "adds")
    made = Tokenizer.from_file(str(path))
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    made.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("ab") == [Tokenizer.from_file(str(path)).token_to_id(letter) for letter in "ab"]


def test_a_plain_added_token_that_ends_documents_is_text_in_text(tmp_path: Path):
    path = hugging_face_file(tmp_path / "plain")
    added = json.loads(path.read_text())["added_tokens"]
    tokenizer = load_tokenizer(str(edited(path, added_tokens=[token | {"special": False} for token in added])))
    text = "one<|endoftext|>two"
    assert tokenizer.eod_id == 256 and 256 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_symbol_that_ends_documents_is_text_in_text(model_path: Path, tmp_path: Path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(model_path.read_bytes())
    model.pieces[1].type = ModelProto.SentencePiece.USER_DEFINED
    path = tmp_path / "user.model"
    path.write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(str(path))
    text = "one<eod>two"
    assert tokenizer.eod_id == 1 and 1 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_are_question_marks_in_every_kind(model_path: Path, tmp_path: Path):
    ranks = tmp_path / "gpt2.tiktoken"
    ranks.write_bytes(ranks_of_bytes())
    for spec in ("bytes", str(model_path), str(hugging_face_file(tmp_path / "hf")), str(ranks)):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a?b?"


def ranks_of_bytes() -> bytes:
    import base64

    return b"".join(b"%s %d\n" % (base64.b64encode(bytes([value])), value) for value in range(256))
