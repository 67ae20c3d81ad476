"""Splitting patterns in the dialect of the tokenizers library cut texts where tiktoken cuts them."""

from __future__ import annotations

import random
import sys

import pytest
import tiktoken

from megatron_adamba.data.rank_encodings import published_encodings
from megatron_adamba.errors import TokenizerError
from megatron_adamba.surgery.export_tokenizer import _byte_pairs
from megatron_adamba.surgery.split_pattern import for_tokenizers

RANKS = {bytes([value]): value for value in range(256)}
PAIRS = ["\n\n", " \n", "\n ", "  ", "aa", "ab", "a ", " a", "12", "++", "''", "'s", "\r\n", "AB", "aA", ".."]
CHARS = " \n\r\tabAB12+*?.'sStd$^-_\u00e9\u4f60\u0301\u01c5\U0001f600\u00a0"
ALL = "|(?s:.)"
"""so that the pattern leaves nothing out"""
OWN = [
    r"\++|[^+]+",
    r"[*+]+|[^*+]",
    r"[=?+/]|a+|[^=?+/a]+",
    r"\p{N}++(?!\.)|\p{N}|\P{N}+",
    r"\p{N}{1,2}+a|\p{N}{1,3}+" + ALL,
    r"(?:ab){1,2}+a|(?>a+)b" + ALL,
    r"[ab]{2}?b" + ALL,
    r"a{,2}b|a{2,}?" + ALL,
    r"a*+b|a?+b" + ALL,
    r"(?:a+?)+b|a*?b" + ALL,
    r"a+$|^a+|\n$" + ALL,
    r"(?m)^a+$|^ +|\n" + ALL,
    r"(?m:a$|^b)|b$" + ALL,
    r"(?s).\n|(?-s).+|\n",
    r"a(?i)b|s" + ALL,
    r"(?:(?i)a|b(?-i)a)+" + ALL,
    r"(?i:'s|'t)|[^\s']+|\s+|'",
    r"(?x) a \  # a comment )" + "\n" + r" b? | [ a b ]+ " + ALL,
    r"\pL+|\p{^L}|\pN",
    r"[\p{L}--[ab]]+|[\p{L}&&[^ab]a]+" + ALL,
    r"[[:alpha:][:digit:]]+|[[:^punct:]]+" + ALL,
    r"[]a]+|[^]a]+",
    r"\p{Script=Han}+|\x{61}\u0062|[\x41\u{42}]+" + ALL,
    r"(?P<one>a|b)(?P=one)|(?<two>\d)\k<two>" + ALL,
    r"(a|b)\1|(?#a comment)\n+" + ALL,
    r"\<[ab]+\>|\b\w+\b|\s+" + ALL,
    r"(?<=a)b+|(?<![ab])s" + ALL,
    r"a\{|[{}]+|\$\^|[$^]+" + ALL,
    r"\s+(?!\S)|\s+$|\S+|\s",
]


def tokenizers_of(pattern: str):
    ranks = RANKS | {pair.encode(): 256 + place for place, pair in enumerate(PAIRS)}
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return theirs, _byte_pairs(ranks, pattern)


def texts(count: int, seed: int = 0):
    generator = random.Random(seed)
    for _ in range(count):
        chars = generator.sample(CHARS, 4) if generator.random() < 0.5 else CHARS
        yield "".join(generator.choices(chars, k=generator.randint(0, 14)))


@pytest.mark.oracle
@pytest.mark.parametrize("pattern", [*(found.pattern for found in published_encodings().values()), *OWN])
def test_pieces_are_tiktokens(pattern: str):
    theirs, ours = tokenizers_of(pattern)
    for text in ["a\n\nb", "a \n\n b\n", "\n", *texts(1500)]:
        assert ours.encode(text).ids == theirs.encode_ordinary(text), (text, for_tokenizers(pattern))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "nanochat"])
def test_every_character_falls_on_its_side(name: str):
    """Between a letter, a digit, a space and a sign."""
    theirs, ours = tokenizers_of(published_encodings()[name].pattern)
    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    chars = [char for char in chars if char.isprintable() or char.isspace()][::7]
    for start in range(0, len(chars), 500):
        text = "".join(f"a{char}A{char}1{char} {char}.{char}\n" for char in chars[start : start + 500])
        assert ours.encode(text).ids == theirs.encode_ordinary(text), start


@pytest.mark.parametrize(
    ("pattern", "words"),
    [(r"\X|a", r"\\X"), ("(?U)a", "option U"), ("[a~~b]", "~~"), (r"(?(1)a)", r"\(\?\("), (r"\b{start}a", r"\\b")],
)
def test_what_has_no_counterpart_is_named(pattern: str, words: str):
    with pytest.raises(TokenizerError, match=words) as caught:
        _byte_pairs(RANKS, pattern)
    assert "cl100k_base" in str(caught.value) and "\n" not in str(caught.value)


def test_what_needs_no_other_words_keeps_its_own():
    pattern = published_encodings()["nanochat"].pattern
    assert for_tokenizers(pattern) == pattern
