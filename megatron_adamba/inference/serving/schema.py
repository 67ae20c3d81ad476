"""What clients send: OpenAI's completions and chat completions, as far as they are served, with `mode` as an extra.

https://platform.openai.com/docs/api-reference/completions, .../chat
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = str | list[str]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(BaseModel):
    """Fields that are not known are refused, so that nobody believes in one that does nothing."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | None = None
    seed: int | None = Field(None, ge=0, le=2**62)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # served for nothing but their neutral values
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
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
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    echo: bool = False
    suffix: None = None
    logprobs: None = None
    best_of: Literal[1] | None = None


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
