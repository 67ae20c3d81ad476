"""What a request that is not answered is told: errors of all kinds as OpenAI's clients read them."""

from __future__ import annotations

import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from megatron_adamba.config.script import without_flags
from megatron_adamba.errors import AdambaError
from megatron_adamba.inference.serving.limits import error_body
from megatron_adamba.inference.serving.schema import ChatRequest, CompletionRequest
from megatron_adamba.inference.serving.worker import QueueFull


def in_words_of_a_request(text: str) -> tuple[str, str | None]:
    """A message of a command's, which begins with a flag, for those who sent a field; and the field."""
    text = re.sub(r"\bmax_new_tokens\b", "max_tokens", without_flags(text))
    first = re.split(r"\W", text, maxsplit=1)[0]
    return text, first if first in CompletionRequest.model_fields | ChatRequest.model_fields else None


def add_refusals(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            message = f"the body is not JSON: {reason} at character {first['loc'][-1]}"
            return JSONResponse(error_body(message, "invalid_request_error"), 400)
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{place}: {first['msg']}" if place else first["msg"]
        return JSONResponse(error_body(message, "invalid_request_error", place or None), 400)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return JSONResponse(error_body(str(error), "rate_limit_error"), 429, {"Retry-After": "1"})

    @app.exception_handler(AdambaError)
    async def refused(request: Request, error: AdambaError) -> JSONResponse:
        message, param = in_words_of_a_request(str(error))
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger("megatron_adamba").error("a request failed", exc_info=error)
        return JSONResponse(error_body("the server failed on this request", "server_error"), 500)
