"""No text becomes a special token of a tokenizer.json, and no file of one takes all memory."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
from test_tokenizers import hugging_face_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import TokenizerError

LETTERS = "\u2581<>/sabpd[]SEP"
SPELLED = ["</s>", "<pad>", "</s></s>", "a</s>b", " </s> <pad>", "</s", "</</s>s>", "a b</s>", "<pad"]


def unigram() -> Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    made = Tokenizer(models.Unigram(pieces + [(letter, -5.0) for letter in LETTERS], unk_id=2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def pairs(merges: list[tuple[str, str]], **more: object) -> Tokenizer:
    """Bytes as letters, and what the merges make."""
    names = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **more))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def word_pieces() -> Tokenizer:
    names = ["<pad>", "</s>", "<unk>", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {name: place for place, name in enumerate(names)}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    return made


def words() -> Tokenizer:
    vocabulary = {name: place for place, name in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS = {
    "unigram": (unigram, True),
    "merges": (lambda: pairs([("<", "/"), ("s", ">"), ("</", "s>")]), True),
    "other merges": (lambda: pairs([("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "</s>")]), True),
    "whole words": (lambda: pairs([("a", "b")], ignore_merges=True), True),
    "word pieces": (word_pieces, False),
    "words": (words, False),
}
"""and whether what encodes decodes to the same text"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [True, False])
def test_the_spelling_of_a_special_token_is_plain_text(kind: str, listed: bool, tmp_path: Path):
    make, lossless = KINDS[kind]
    made = make()
    if listed:
        made.add_special_tokens(["<pad>", "</s>"])
    made.add_tokens(["plain"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (1, made.get_vocab_size())
    hidden = {0, 1} if listed else {1}
    for text in SPELLED:
        ids = tokenizer.encode(text)
        assert ids and hidden.isdisjoint(ids), text
        assert tokenizer.encode_batch([text]) == [ids]
        assert not lossless or tokenizer.decode([*ids, 1]) == text.removeprefix(" " * (kind == "unigram"))
    # the rest is as it was, names and ids
    text = "ab plain pad s"
    assert tokenizer.encode(text) == made.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode([0]) == "<pad>"
    assert kind in ("merges", "other merges", "whole words") or tokenizer.decode([2]) == "<unk>"


def test_the_spelling_of_what_is_unknown_is_text(tmp_path: Path):
    made = unigram()
    made.model = models.Unigram(
        [("</s>", 0.0), ("<unk>", 0.0), *((letter, -5.0) for letter in "\u2581<>unk")], unk_id=1
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("n<unk>k")
    assert 1 not in ids and tokenizer.decode(ids) == "n<unk>k"
    assert tokenizer.decode([1]) == "<unk>" and 1 in tokenizer.encode("z")


def test_texts_that_a_normalizer_turns_into_the_spelling(tmp_path: Path):
    made = unigram()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ("a</S>b", "\uff1c/s\uff1e", "<\u200d/s>"):
        assert 1 not in tokenizer.encode(text)


def test_an_end_that_stands_for_what_is_unknown(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    made = words()
    made.model = models.WordLevel(vocab={"</s>": 0, "a": 1}, unk_token="</s>")
    made.save(str(path))
    with pytest.raises(TokenizerError, match="stands for unknown characters"):
        load_tokenizer(str(path))
    # nothing is unknown to one that knows all bytes
    pairs([("a", "b")], unk_token="</s>").save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode("\u00e9</s>\0")) == "\u00e9</s>\0"


def test_random_texts_keep_their_ids(tmp_path: Path):
    """What is hidden changes nothing where it is not spelled."""
    generator = random.Random(0)
    for number, (make, _) in enumerate(KINDS.values()):
        path = tmp_path / str(number) / "tokenizer.json"
        path.parent.mkdir()
        made = make()
        made.save(str(path))
        tokenizer = load_tokenizer(str(path))
        for _ in range(200):
            text = "".join(generator.choices("<>/sab pd", k=generator.randint(0, 12)))
            ids = made.encode(text, add_special_tokens=False).ids
            if not {0, 1} & set(ids):
                assert tokenizer.encode(text) == ids


@pytest.mark.oracle
def test_one_hash_however_transformers_saved_it(tmp_path: Path):
    import transformers

    path = hugging_face_file(tmp_path / "made")
    plain = load_tokenizer(str(path)).hash
    # of an ordinary file it is that of its bytes, as in the datasets that there are
    assert plain == hashlib.sha256(path.read_bytes()).hexdigest()
    for pretty in (True, False):
        Tokenizer.from_file(str(path)).save(str(path), pretty=pretty)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        fast.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(str(path)).hash == load_tokenizer(str(tmp_path / "saved")).hash == plain
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert load_tokenizer(str(path)).hash == plain


def test_a_published_post_processor_stays_in_the_hash(tmp_path: Path):
    path = hugging_face_file(tmp_path / "made")
    made = Tokenizer.from_file(str(path))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.save(str(path))
    assert load_tokenizer(str(path)).hash == hashlib.sha256(path.read_bytes()).hexdigest()


def charsmap(written: str) -> str:
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + written.encode() + b"\0").decode()


LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
EMPTY = {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "c"}
HOSTILE = {
    "replace": {"normalizer": {"type": "Sequence", "normalizers": [LONG] * 4}},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LONG] * 2}]}},
    "empty matches": {"normalizer": {"type": "Sequence", "normalizers": [EMPTY] * 40}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [LONG] * 4}},
    "both": {"normalizer": LONG, "decoder": {"type": "Sequence", "decoders": [LONG, {"type": "Fuse"}]}},
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 50}] * 4}},
    "bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ]
            * 30,
        }
    },
    "table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 5000)}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_texts_that_would_grow_without_end_are_refused_before_they_do(kind: str, tmp_path: Path):
    path = hugging_face_file(tmp_path / "made")
    values = json.loads(path.read_text())
    # the library normalizes such tokens as it reads the file
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 257, "content": "q" * 9, "normalized": True})
    path.write_text(json.dumps(values | HOSTILE[kind]))
    with pytest.raises(TokenizerError, match=r"times as long; up to 1000 are read") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_the_steps_of_published_files_are_read(tmp_path: Path):
    path = hugging_face_file(tmp_path / "made")
    made = Tokenizer.from_file(str(path))
    spaces = [normalizers.Replace(Regex(r" {2,}"), " "), normalizers.Replace(Regex(r"\s+"), " ")]
    steps = [normalizers.Prepend(" "), normalizers.Replace("``", '"'), normalizers.NFKD(), *spaces * 10]
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace("\n", "<newline>")])
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("<newline>", "\n")])
    made.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode("a   b\nc")) == " a b c"


def test_an_end_that_is_unknown_at_the_end_of_a_word_alone(tmp_path: Path):
    """CLIP's form: letters inside words and letters that end them are pieces of their own."""
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["a zebra sat"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="stands for unknown characters"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_ranks_under_the_name_of_sentencepiece_are_told(tmp_path: Path):
    file = tmp_path / "tokenizer.model"
    file.write_text("".join(f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256)))
    with pytest.raises(TokenizerError, match=r"holds ranks, as tiktoken's files do; give --tokenizer tiktoken:"):
        load_tokenizer(str(file))
