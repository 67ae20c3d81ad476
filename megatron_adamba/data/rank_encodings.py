"""What a file of BPE ranks does not say: splitting patterns and special tokens of the encodings that were published."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megatron_adamba.config.rules import nearest
from megatron_adamba.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
NANOCHAT = "nanochat"
NANOCHAT_SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


@dataclass(frozen=True)
class RankEncoding:
    """How text is split before ranks merge it, and which ids stand beside the ranks."""

    pattern: str
    special_tokens: dict[str, int]
    eod_token: str = END_OF_TEXT


@dataclass(frozen=True)
class PublishedEncoding:
    """An encoding that others defined."""

    pattern: str
    special_tokens: dict[str, int] = field(default_factory=dict)
    num_ranks: int = 0
    trailing: tuple[str, ...] = ()
    """special tokens that follow any number of ranks, instead of the two above"""

    def of(self, ranks: Collection[int]) -> RankEncoding:
        """This encoding for a file of these ranks."""
        if self.trailing:
            return RankEncoding(self.pattern, _behind(ranks, self.trailing), self.trailing[0])
        return RankEncoding(self.pattern, dict(self.special_tokens))


def _behind(ranks: Collection[int], tokens: Sequence[str]) -> dict[str, int]:
    return {name: max(ranks) + 1 + place for place, name in enumerate(tokens)}


def published_encodings() -> dict[str, PublishedEncoding]:
    """By name: OpenAI's, as tiktoken defines them, and nanochat's, whose special tokens follow its ranks."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    lower, upper = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    letters, others = r"[^\r\n\p{L}\p{N}]?+\p{L}+", r" ?[^\s\p{L}\p{N}]++[\r\n]*"
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    spaces = r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    cl100k = "|".join((r"'(?i:[sdmt]|ll|ve|re)", letters + "+", r"\p{N}{1,3}+", others + "+", spaces))
    nanochat = "|".join((r"'(?i:[sdmt]|ll|ve|re)", letters, r"\p{N}{1,2}", others, r"\s*[\r\n]|\s+(?!\S)|\s+"))
    o200k = "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contraction}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contraction}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    )
    fill = {f"<|fim_{part}|>": place for place, part in enumerate(("prefix", "middle", "suffix"))}
    end = {END_OF_TEXT: 50256}
    return {
        "gpt2": PublishedEncoding(gpt2, end, 50256),
        "r50k_base": PublishedEncoding(gpt2, end, 50256),
        "p50k_base": PublishedEncoding(gpt2, end, 50280),
        "p50k_edit": PublishedEncoding(gpt2, end | {name: 50281 + place for name, place in fill.items()}, 50280),
        "cl100k_base": PublishedEncoding(
            cl100k,
            {END_OF_TEXT: 100257}
            | {name: 100258 + place for name, place in fill.items()}
            | {"<|endofprompt|>": 100276},
            100256,
        ),
        "o200k_base": PublishedEncoding(o200k, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}, 199998),
        "o200k_harmony": PublishedEncoding(o200k, _harmony_tokens(), 199998),
        NANOCHAT: PublishedEncoding(nanochat, trailing=NANOCHAT_SPECIAL_TOKENS),
    }


def _harmony_tokens() -> dict[str, int]:
    named = {
        "<|startoftext|>": 199998,
        END_OF_TEXT: 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
        "<|endofprompt|>": 200018,
    }
    reserved = set(range(200000, 201088)) - (set(named.values()) - {200018})
    return named | {f"<|reserved_{token}|>": token for token in sorted(reserved)}


def encoding_of_pattern(pattern: str, ranks: Collection[int], flag: str) -> RankEncoding:
    """The encoding that a splitting pattern, given by an encoding's name or as a regular expression, makes of a file.

    Special tokens are those of the name where the file has as many ranks as that encoding; else the id after the last
    rank ends a document. Raises TokenizerError for what is neither a known name nor can be meant as an expression.
    """
    known = published_encodings()
    if pattern in known:
        published = known[pattern]
        if published.trailing or published.num_ranks == len(ranks):
            return published.of(ranks)
        return RankEncoding(published.pattern, _behind(ranks, (END_OF_TEXT,)))
    if re.fullmatch(r"[\w.-]*", pattern):
        meant = nearest(pattern, known) or NANOCHAT
        raise TokenizerError(
            f"{flag} {pattern}: is no known encoding; give one of {', '.join(known)}, for example {meant}, or a "
            "regular expression"
        )
    return RankEncoding(pattern, _behind(ranks, (END_OF_TEXT,)))
