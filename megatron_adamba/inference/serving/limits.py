"""Limits of the server, and the one on the size of a body, which holds before anything reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from megatron_adamba.config.rules import in_range, usual
from megatron_adamba.inference.text_stream import clean_text

_LONGEST_END = 200
"""characters at the beginning and at the end of a message"""

_MEANT = {
    "body_bytes": (1, 2**30),
    "new_tokens": (1, 2**24),
    "context": (1, 2**24),
    "slots": (1, 4096),
    "queue": (1, 2**20),
    "choices": (1, 2**16),
    "connections": (1, 2**20),
    "request_seconds": (0.001, 86400),
    "shutdown_seconds": (0.001, 86400),
}
"""the least and the most that can be meant: memory is taken for slots, and for what may arrive and wait"""


@dataclass(frozen=True)
class ServerLimits:
    """What one client can take."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024
    """of one choice"""
    context: int = 4096
    """tokens of prompt and text together"""
    slots: int = 8
    """sequences that run side by side"""
    queue: int = 256
    """that wait for a slot"""
    choices: int = 32
    """sequences of one request: prompts times n"""
    connections: int = 512
    """that are open at once"""
    request_seconds: float = 30.0
    """that a request may take to arrive, and an answer to be read on"""
    shutdown_seconds: float = 5.0
    """that answers have to end when the server stops"""

    @property
    def share(self) -> int:
        """Sequences of one client that may wait: those of one request, and never the last place."""
        return max(min(max(self.queue // 2, self.choices), self.queue - 1), 1)

    def check(self) -> None:
        """Raises ConfigError."""
        for name, (least, most) in _MEANT.items():
            in_range(f"--{name.replace('_', '-')}", getattr(self, name), least, most, usual(self, name))


class BodyLimit:
    """ASGI middleware (asgi.readthedocs.io, HTTP connection scope): larger bodies are answered with 413."""

    def __init__(self, app, body_bytes: int) -> None:
        self.app, self.body_bytes = app, body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.body_bytes:
            await self._refuse(send)
            return
        seen = 0

        async def limited():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body_bytes:
                raise HTTPException(413, self._message)
            return message

        await self.app(scope, limited, send)

    @property
    def _message(self) -> str:
        return f"the body is larger than {self.body_bytes} bytes"

    async def _refuse(self, send) -> None:
        body = json.dumps(error_body(self._message, "invalid_request_error"))
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """As OpenAI's clients read it; what it quotes of a request may hold halves of pairs, and be as long as that."""
    param = None if param is None else _quotable(param)
    return {"error": {"message": _quotable(message), "type": kind, "param": param, "code": code}}


def _quotable(text: str) -> str:
    """Without the middle, where it is long: what is wrong stands at one end."""
    if len(text) > 2 * _LONGEST_END:
        text = f"{text[:_LONGEST_END]} ... {text[-_LONGEST_END:]}"
    return clean_text(text)
