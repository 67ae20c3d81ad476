"""What clients send: OpenAI's completions and chat completions, as far as they are served, with `mode` as an extra.

https://platform.openai.com/docs/api-reference/completions, .../chat
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_adamba.inference.text_stream import clean_text

MOST_STOPS, LONGEST_STOP = 4, 1000
"""strings, as OpenAI has it, and characters of one: all are looked for behind every token"""
LONGEST_MODE = 100
"""characters"""


def _refused(rule: str) -> PydanticCustomError:
    """One complaint in plain words, at the place of the field: a union makes one of each member, under its type."""
    return PydanticCustomError("refused", "{rule}", {"rule": rule})


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds == {str}:
            return [clean_text(text) for text in value]
        if kinds <= {int} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
            return value
    raise _refused("must be a text, a list of texts, a list of token ids or a list of such lists")


def _stop(value: Any) -> tuple[str, ...]:
    """One with halves of pairs is in no text, and must not become the U+FFFD that may be."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(text, str) for text in stops):
        raise _refused(f"must be a text or a list of at most {MOST_STOPS}")
    if any(len(text) > LONGEST_STOP for text in stops):
        raise _refused(f"must have at most {LONGEST_STOP} characters")
    return tuple(stops)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return clean_text(value)
    if not isinstance(value, list):
        raise _refused("must be a text or a list of text parts")
    for place, part in enumerate(value):
        known = isinstance(part, dict) and {name for name, held in part.items() if held is not None} == {"type", "text"}
        if not known or part["type"] != "text" or not isinstance(part["text"], str):
            raise _refused(f'only text parts are read, as {{"type": "text", "text": "..."}}; part {place} is none')
    return clean_text("".join(part["text"] for part in value))


Prompt = Annotated[Any, PlainValidator(_prompt)]
Stops = Annotated[Any, PlainValidator(_stop)]
Content = Annotated[Any, PlainValidator(_content)]
# numbers in quotes, true for 1 and "no" for true are slips that nobody should have to look for in a text
Whole = StrictInt
Number = StrictFloat
Flag = StrictBool
Neutral = Annotated[StrictFloat, Field(ge=0, le=0)]
"""served for nothing but 0"""


class _Nullable(BaseModel):
    """null counts as left out, for fields that are not known too."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.null_fields()}

    @classmethod
    def null_fields(cls) -> frozenset[str]:
        """Those in which null is a value of its own."""
        return frozenset()


class StreamOptions(_Nullable):
    model_config = ConfigDict(extra="ignore")
    include_usage: Flag = False


class _Common(_Nullable):
    """Fields that are not known are refused, so that nobody believes in one that does nothing."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: Number = Field(1.0, ge=0, le=100)
    top_p: Number = Field(1.0, ge=0, le=1)
    n: Whole = Field(1, ge=1, le=16)
    stream: Flag = False
    stream_options: StreamOptions | None = None
    stop: Stops = ()
    seed: Whole | None = Field(None, ge=0, le=2**62)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Flag | None = None
    presence_penalty: Neutral = 0
    frequency_penalty: Neutral = 0
    logit_bias: dict[str, Number] | None = Field(None, max_length=0)
    # ours
    mode: str = Field("think", max_length=LONGEST_MODE)
    width: Whole | None = None
    energy_price: Number | None = Field(None, ge=0)
    exit_threshold: Number | None = Field(None, ge=0, le=1)
    expand_cost: Number | None = Field(None, ge=0)
    min_width: Whole | None = Field(None, ge=1)
    top_k: Whole = Field(0, ge=0)
    repetition_penalty: Number = Field(1.0, ge=0.01, le=100)


class CompletionRequest(_Common):
    prompt: Prompt
    max_tokens: Whole | None = Field(16, ge=1)
    """null: what is left of the context"""
    echo: Flag = False
    suffix: None = None
    logprobs: None = None
    best_of: Whole | None = Field(None, ge=1, le=1)

    @classmethod
    def null_fields(cls) -> frozenset[str]:
        return frozenset({"max_tokens"})


class Message(_Nullable):
    """An assistant's without content is one that said nothing."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _silent(cls, values: Any) -> Any:
        silent = isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None
        return {**values, "content": ""} if silent else values


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    """without either: what is left of the context"""
    logprobs: Annotated[Flag, Field(le=False)] | None = None
    top_logprobs: None = None
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
