"""What clients send: OpenAI's completions and chat completions, as far as they are served, with `mode` as an extra.

https://platform.openai.com/docs/api-reference/completions, .../chat
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from megatron_adamba.inference.text_stream import clean_text

MOST_STOPS, LONGEST_STOP = 4, 1000
"""strings, as OpenAI has it, and characters of one: all are looked for behind every token"""

Cleaned = Annotated[str, AfterValidator(clean_text)]


def _short(text: str) -> str:
    if len(text) > LONGEST_STOP:
        raise ValueError(f"must have at most {LONGEST_STOP} characters")
    return text


# one with halves of pairs is in no text, and must not become the U+FFFD that may be
Stop = Annotated[str, AfterValidator(_short)]
# a body of wrong items would make as many complaints
Strings = Annotated[list[Cleaned], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


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
    include_usage: bool = False


class _Common(_Nullable):
    """Fields that are not known are refused, so that nobody believes in one that does nothing."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=0, le=2**62)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # served for nothing but their neutral values
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # ours
    mode: str = "think"
    width: int | None = None
    energy_price: float | None = Field(None, ge=0)
    exit_threshold: float | None = Field(None, ge=0, le=1)
    expand_cost: float | None = Field(None, ge=0)
    min_width: int | None = Field(None, ge=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Common):
    prompt: Cleaned | Strings | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: int | None = Field(16, ge=1)
    """null: what is left of the context"""
    echo: bool = False
    suffix: None = None
    logprobs: None = None
    best_of: Literal[1] | None = None

    @classmethod
    def null_fields(cls) -> frozenset[str]:
        return frozenset({"max_tokens"})


class ContentPart(_Nullable):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Cleaned


class Message(_Nullable):
    """An assistant's without content is one that said nothing."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Cleaned | Annotated[list[ContentPart], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _silent(cls, values: Any) -> Any:
        silent = isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None
        return {**values, "content": ""} if silent else values

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """without either: what is left of the context"""
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
