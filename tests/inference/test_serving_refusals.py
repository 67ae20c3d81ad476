"""What requests that are refused are told: the field by its name, the rule in plain words, never more than a few lines
of what they sent."""

from __future__ import annotations

import socket

import httpx
import pytest
from inference.served import LIMITS, alone, serving
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT"), "fp32")


@pytest.fixture(scope="module")
def address(loaded):
    with serving(loaded, LIMITS) as address:
        yield address


def said(content) -> list[dict]:
    return [{"role": "user", "content": content}]


ONLY_TEXT = "messages.0.content: only text parts are read"
PROMPT = "prompt: must be a text, a list of texts, a list of token ids or a list of such lists"
REFUSED = [
    ({"prompt": 3}, "prompt", PROMPT),
    ({"prompt": ["a", 1]}, "prompt", PROMPT),
    ({"prompt": [[1], ["a"]]}, "prompt", PROMPT),
    ({"prompt": [True, False]}, "prompt", PROMPT),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens: Input should be a valid integer"),
    ({"prompt": "a", "max_tokens": "2"}, "max_tokens", "max_tokens: Input should be a valid integer"),
    ({"prompt": "a", "n": True}, "n", "n: Input should be a valid integer"),
    ({"prompt": "a", "stream": "no"}, "stream", "stream: Input should be a valid boolean"),
    ({"prompt": "a", "temperature": "1"}, "temperature", "temperature: Input should be a valid number"),
    ({"prompt": "a", "presence_penalty": False}, "presence_penalty", "presence_penalty: Input should be a valid"),
    ({"prompt": "a", "stop": 3}, "stop", "stop: must be a text or a list of at most 4"),
    ({"prompt": "a", "mode": "m" * 15_000}, "mode", "mode: String should have at most 100 characters"),
    ({"prompt": "a", "k" * 15_000: 1}, "k" * 200, "Extra inputs are not permitted"),
    ({"prompt": "a", "mode": "loud"}, "mode", "mode loud: unknown"),
    ({"prompt": "a", "width": 9}, "width", "width 9: not in this model's nest"),
    ({"prompt": "a", "width": 10**4000}, "width", "not in this model's nest"),
    ({"prompt": "a", "top_k": 10**10}, "top_k", "top_k 10000000000: must lie between 0 and 1000000000"),
    ({"prompt": ["a"] * 5}, "n", "n: 5 texts at once"),
    ({"prompt": []}, "prompt", "prompt: is empty"),
    ({"prompt": [300]}, "prompt", "prompt: holds a token id"),
    ({"prompt": "a", "max_tokens": 65}, "max_tokens", "max_tokens 65: this server makes at most 64"),
    ({"prompt": "a" * 280, "max_tokens": 60}, "max_tokens", "max_tokens 60: with a prompt of 281 tokens"),
    ({"messages": said(3)}, "messages.0.content", "messages.0.content: must be a text or a list of text parts"),
    ({"messages": said([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages.0.content", ONLY_TEXT),
    ({"messages": said([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}])}, None, "part 1 is none"),
    ({"messages": said([None])}, "messages.0.content", ONLY_TEXT),
    ({"messages": said([{"type": "text", "text": None}])}, "messages.0.content", ONLY_TEXT),
    ({"messages": said("a"), "top_k": 10**10}, "top_k", "top_k 10000000000: must lie between"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_refusal_names_the_field_and_the_rule(address, body, param, message):
    path = "chat/completions" if "messages" in body else "completions"
    answer = httpx.post(f"{address}/v1/{path}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and len(answer.content) < 1200
    assert error["param"][:200] == (param or "messages.0.content")


def test_whole_numbers_stand_for_others_and_infinity_for_never(address, loaded):
    body = {"prompt": "ab", "max_tokens": 6, "temperature": 0, "top_p": 1, "presence_penalty": 0, "mode": "adaptive"}
    raw = str(body | {"exit_threshold": 0.4, "expand_cost": 1e999}).replace("'", '"').replace("inf", "Infinity")
    answer = httpx.post(f"{address}/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    want = alone(loaded, "ab", 6, Mode("adaptive", None, {"exit_threshold": 0.4, "expand_cost": float("inf")}))[0]
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == want


def test_long_names_in_a_path_are_not_sent_back(address):
    answer = httpx.get(f"{address}/v1/models/{'m' * 20_000}")
    assert answer.json()["error"]["code"] == "model_not_found" and len(answer.content) < 1200


def test_what_is_no_http_is_told_so_as_json(address):
    host, port = address.removeprefix("http://").split(":")
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for raw in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", begun + b"zz\r\n"):
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(raw)
            answer = httpx.Response(200, content=b"".join(iter(lambda: connection.recv(65536), b"")))
        head, _, body = answer.content.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head.lower()
        assert httpx.Response(400, content=body).json()["error"]["type"] == "invalid_request_error"


def test_a_name_that_is_not_utf8_is_cleaned(loaded):
    with serving(loaded, LIMITS, name="r\udce9sum") as address:
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "r\ufffdsum"
        assert httpx.get(f"{address}/v1/models/r\ufffdsum").status_code == 200
        body = {"prompt": "a", "max_tokens": 1}
        for stream in (False, True):
            answer = httpx.post(f"{address}/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 200 and "r\ufffdsum" in answer.text
        assert httpx.get(address).status_code == 200
