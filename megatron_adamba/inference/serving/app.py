"""The HTTP side: routes, answers and errors as OpenAI's clients know them."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from importlib.resources import files
from ipaddress import ip_address

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.serving.choices import Choice, make_choices, run_choices
from megatron_adamba.inference.serving.hosts import LOOPBACK, HostCheck
from megatron_adamba.inference.serving.limits import BodyLimit, ServerLimits, error_body
from megatron_adamba.inference.serving.refusals import add_refusals
from megatron_adamba.inference.serving.schema import ChatRequest, CompletionRequest, Message
from megatron_adamba.inference.serving.worker import Worker
from megatron_adamba.inference.text_stream import Stripped, clean_text, finished_text

_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def make_app(loaded: LoadedModel, name: str, limits: ServerLimits, hosts: AbstractSet[str] = LOOPBACK) -> FastAPI:
    """name: what the model is called in answers; hosts: names that it answers to (`allowed_hosts`)."""
    worker = Worker(Generation(loaded, limits.slots, limits.context), limits.queue, limits.share)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="megatron_adamba", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, body_bytes=limits.body_bytes)
    app.add_middleware(HostCheck, allowed=frozenset(hosts))
    add_refusals(app)
    # a folder or a word of a command line may hold what no answer can
    server = _Server(loaded, clean_text(name), limits, worker)
    app.get("/", response_class=HTMLResponse)(server.page)
    app.get("/health")(server.health)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{model:path}")(server.model)
    app.post("/v1/completions")(server.completions)
    app.post("/v1/chat/completions")(server.chat)
    return app


class _Server:
    """Handlers that share one model."""

    def __init__(self, loaded: LoadedModel, name: str, limits: ServerLimits, worker: Worker) -> None:
        self.loaded, self.name, self.limits, self.worker = loaded, name, limits, worker
        self.html = files("megatron_adamba.inference.serving").joinpath("chat.html").read_text("utf-8")

    async def page(self) -> str:
        config = self.loaded.model.config
        modes = ["adaptive"] * (self.loaded.gates is not None) + ["think", *reversed(config.modes)]
        facts = {
            "model": self.name,
            "modes": modes,
            "num_layers": config.num_layers,
            "new_tokens": self.limits.new_tokens,
        }
        return self.html.replace("{{FACTS}}", json.dumps(facts).replace("<", "\\u003c"))

    async def health(self) -> dict:
        return {"status": "ok", "waiting": self.worker.waiting}

    async def models(self) -> dict:
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str):
        if model != self.name:
            message = f"the model {model} does not exist; this server has {self.name}"
            return JSONResponse(error_body(message, "invalid_request_error", "model", "model_not_found"), 404)
        return self._model()

    def _model(self) -> dict:
        return {"id": self.name, "object": "model", "owned_by": "local", "created": 0}

    async def completions(self, request: Request, body: CompletionRequest):
        prompts = await run_in_threadpool(self._prompts, body)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        choices = self._choices(body, prompts, body.max_tokens, body.stop)
        echoes = [finished_text(self.loaded.tokenizer, c.request.prompt) if body.echo else "" for c in choices]
        if body.stream:
            pieces = lambda choice, text: {"text": text, "logprobs": None}
            return await self._stream(request, body, choices, head, pieces, echoes)
        await self._run(request, choices)
        answers = [
            {"index": c.index, "text": echo + c.text, "logprobs": None, "finish_reason": c.finish, "adamba": _took(c)}
            for c, echo in zip(choices, echoes)
        ]
        return self._answer(head, answers, choices)

    async def chat(self, request: Request, body: ChatRequest):
        prompt = await run_in_threadpool(self._encode, _transcript(body.messages))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        most = body.max_completion_tokens or body.max_tokens
        choices = self._choices(body, [prompt], most, (*body.stop, "\nUser:"))
        if body.stream:
            head["object"] = "chat.completion.chunk"
            stripped = [Stripped() for _ in choices]

            def pieces(choice: Choice, text: str) -> dict:
                # clients put the pieces of each field together
                role = {"role": "assistant"} if len(choice.compute) == 1 else {}
                return {"delta": {**role, "content": stripped[choice.index].push(text)}}

            return await self._stream(request, body, choices, head, pieces, [""] * len(choices))
        await self._run(request, choices)
        answers = [
            {
                "index": c.index,
                "message": {"role": "assistant", "content": c.text.strip()},
                "finish_reason": c.finish,
                "adamba": _took(c),
            }
            for c in choices
        ]
        return self._answer(head, answers, choices)

    def _encode(self, text: str) -> list[int]:
        return [self.loaded.tokenizer.eod_id, *self.loaded.tokenizer.encode(text)]

    def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        given = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if len(given) * body.n > self.limits.choices:
            raise ConfigError(f"n: {len(given) * body.n} texts at once; at most {self.limits.choices}")
        prompts = [self._encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
        vocab = min(self.loaded.model.config.vocab_size, self.loaded.tokenizer.vocab_size)
        for prompt in prompts:
            if any(not 0 <= token < vocab for token in prompt):
                raise ConfigError(f"prompt: holds a token id outside the vocabulary of {vocab}")
        if not prompts:
            raise ConfigError("prompt: is empty; give at least one")
        return prompts

    def _choices(self, body, prompts: Sequence[list[int]], most: int | None, stops: tuple[str, ...]) -> list[Choice]:
        """most: None: what is left of the context, as far as the server lets anybody."""
        limits = self.limits
        if most is not None and most > limits.new_tokens:
            raise ConfigError(f"max_tokens {most}: this server makes at most {limits.new_tokens}")
        if len(prompts) * body.n > limits.choices:
            raise ConfigError(f"n: {len(prompts) * body.n} texts at once; at most {limits.choices}")
        names = ("exit_threshold", "expand_cost", "min_width")
        given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
        mode = Mode(body.mode, body.width, given, body.energy_price)
        seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**62
        sampling = Sampling(body.temperature, body.top_k, body.top_p, body.repetition_penalty, seed)
        requests = []
        for prompt in prompts:
            if not prompt:
                raise ConfigError("prompt: is empty; give at least one token")
            policy = mode.policy(self.loaded, prompt)
            left = max(1, min(limits.new_tokens, limits.context - len(prompt)))
            new = left if most is None else most
            request = GenerationRequest(
                tuple(prompt), policy, new, sampling, stops, echoed=getattr(body, "echo", False)
            )
            request.check(limits.context)
            requests.append(request)
        return make_choices(self.loaded, requests, body.n, mode.asks_estimator(self.loaded))

    async def _run(self, request: Request, choices: Sequence[Choice]) -> None:
        async for choice, event in run_choices(self.worker, choices, request.is_disconnected, _client(request)):
            choice.take(event)

    def _answer(self, head: dict, answers: list[dict], choices: Sequence[Choice]) -> dict:
        told = {"created": int(time.time()), "model": self.name}
        return {**head, **told, "choices": answers, "usage": _usage(choices)}

    async def _stream(self, request: Request, body, choices, head: dict, pieces, echoes) -> StreamingResponse:
        """Server-sent events (html.spec.whatwg.org, section 9.2), each a JSON object, [DONE] last."""
        head |= {"created": int(time.time()), "model": self.name}
        told = run_choices(self.worker, choices, request.is_disconnected, _client(request))
        # the first token before the first byte: what is refused has a status of its own
        first = await anext(told, None)

        async def events() -> AsyncIterator[str]:
            try:
                pending = first
                while pending is not None:
                    choice, event = pending
                    took = choice.take(event)
                    text = (echoes[choice.index] if len(choice.compute) == 1 else "") + event.new.text
                    answer = {"index": choice.index, **pieces(choice, text), "finish_reason": event.new.finish}
                    yield _event({**head, "choices": [answer | {"adamba": took}]})
                    pending = await anext(told, None)
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield _event({**head, "choices": [], "usage": _usage(choices)})
                yield "data: [DONE]\n\n"
            except Exception as error:
                logging.getLogger("megatron_adamba").error("a stream failed", exc_info=error)
                yield _event(error_body("the server failed on this request", "server_error"))
            finally:
                await told.aclose()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _transcript(messages: Sequence[Message]) -> str:
    """Turns as plain text, as none of our models has a template of its own."""
    return "\n".join(f"{_ROLES[message.role]}: {message.content}" for message in messages) + "\nAssistant:"


def _took(choice: Choice) -> dict:
    return {
        "exit_layers": choice.exit_layers,
        "widths": choice.widths,
        "compute": [round(share, 4) for share in choice.compute],
        "compute_saved": round(choice.saved, 4),
    }


def _client(request: Request) -> str:
    """Whose turn a request takes: an address. Of this machine's own users, who all have the same one, a connection."""
    if request.client is None:
        return ""
    host, port = request.client
    try:
        own = ip_address(host).is_loopback
    except ValueError:
        own = False
    return f"{host}:{port}" if own else host


def _usage(choices: Sequence[Choice]) -> dict:
    """A prompt counts once, however many texts are made of it."""
    read = sum(len(choice.request.prompt) for choice in choices if choice.first)
    made = sum(len(choice.compute) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _event(values: dict) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
