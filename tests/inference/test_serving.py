"""The server through real sockets: OpenAI's own client, streams, limits, bad requests by the thousand, many clients."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from inference.served import LIMITS, alone, serving
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.serving.limits import ServerLimits


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT"), "fp32")


@pytest.fixture(scope="module")
def address(loaded):
    with serving(loaded, LIMITS) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions_of_the_official_client(client, loaded):
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0)
    text, _ = alone(loaded, "abc", 9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.model) == (text, "length", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 9, 13)
    took = answer.choices[0].adamba
    assert took["exit_layers"] == [8] * 9 and took["widths"] == [32] * 9 and took["compute_saved"] == 0
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_several_prompts_and_choices_keep_their_places(client, loaded):
    answer = client.completions.create(model="tiny", prompt=["a", "bcd"], n=2, max_tokens=5, seed=7, temperature=1.3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(answer.choices, [("a", 7), ("a", 8), ("bcd", 7), ("bcd", 8)]):
        assert choice.text == alone(loaded, prompt, 5, None, Sampling(1.3, seed=seed))[0]
    ids = client.completions.create(model="tiny", prompt=[256, 97], max_tokens=5, temperature=0, echo=True)
    assert ids.choices[0].text == "a" + alone(loaded, [256, 97], 5)[0]


def test_modes(client, loaded):
    """Adaptive by name, a width, and what their tokens took."""
    extra = {"mode": "adaptive", "exit_threshold": 0.4}
    answer = client.completions.create(model="tiny", prompt="ab", max_tokens=8, temperature=0, extra_body=extra)
    text, news = alone(loaded, "ab", 8, Mode("adaptive", None, {"exit_threshold": 0.4}))
    took = answer.choices[0].adamba
    assert answer.choices[0].text == text and took["exit_layers"] == [new.exit_layer for new in news]
    assert len(set(took["exit_layers"])) > 1 and 0 < took["compute_saved"] < 1
    narrow = client.completions.create(model="tiny", prompt="ab", max_tokens=8, temperature=0, extra_body={"width": 8})
    assert narrow.choices[0].text == alone(loaded, "ab", 8, Mode(width=8))[0]


def test_streams(client, loaded):
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(prompt="ab", stream_options={"include_usage": True}, **settings))
    text, _ = alone(loaded, "ab", 12)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text and len(chunks) == 13
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-2].choices[0].finish_reason == "length"
    chat = list(client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **settings))
    text, _ = alone(loaded, "User: hi\nAssistant:", 12, stop=("\nUser:",))
    assert "".join(chunk.choices[0].delta.content for chunk in chat) == text
    assert all(chunk.choices[0].adamba["exit_layer"] == 8 for chunk in chat)


def test_chats(client, loaded):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=10, temperature=0)
    prompt = "System: be brief\nUser: one two\nAssistant: three\nUser: four\nAssistant:"
    assert answer.choices[0].message.content == alone(loaded, prompt, 10, stop=("\nUser:",))[0].strip()
    # without a number it goes on as far as the server lets it
    assert client.chat.completions.create(model="tiny", messages=messages[1:2]).usage.completion_tokens <= 64


def test_stop_strings(client, loaded):
    text, _ = alone(loaded, "ab", 12)
    stop = text[3:5]
    answer = client.completions.create(model="tiny", prompt="ab", max_tokens=12, temperature=0, stop=[stop, "never"])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": [[]]}, "prompt: is empty; give at least one token"),
        ({"prompt": [300]}, "prompt: holds a token id outside the vocabulary of 257"),
        ({"prompt": "a", "max_tokens": 65}, "max_tokens 65: this server makes at most 64"),
        ({"prompt": "a" * 280, "max_tokens": 60}, "more than the 300 of this context"),
        ({"prompt": ["a"] * 5}, "n: 5 texts at once; at most 4"),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "a", "temperature": 1e-40}, None),
        ({"prompt": "a", "temperature": 1, "repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"prompt": "a", "mode": "loud"}, "mode loud: unknown"),
        ({"prompt": "a", "width": 9}, "width 9: not in this model's nest"),
        ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ({"prompt": "a", "frequency_penalty": 1}, "frequency_penalty"),
        ({"prompt": "a", "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({}, "prompt: Field required"),
    ],
    ids=str,
)
def test_what_is_refused(address, body, message):
    answer = httpx.post(f"{address}/v1/completions", json={"max_tokens": 2} | body)
    if message is None:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_large_bodies_are_refused_before_they_are_read(address):
    large = json.dumps({"prompt": "a" * 30_000})
    assert httpx.post(f"{address}/v1/completions", content=large).status_code == 413

    def pieces():
        for _ in range(40):
            yield b"x" * 1000

    assert httpx.post(f"{address}/v1/completions", content=pieces()).status_code == 413
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


def garbage(random_: random.Random) -> bytes:
    """A body that is no good request."""
    kinds = [
        lambda: random_.randbytes(random_.randint(0, 200)),
        lambda: b"[" * random_.randint(1, 5000),
        lambda: b'{"a":' * random_.randint(1, 3000),
        lambda: json.dumps({"prompt": random_.choice([None, 3, {}, [[]], [None], ["a", 1]])}).encode(),
        lambda: json.dumps({"prompt": "a", "max_tokens": random_.choice([0, -1, "x", 1e99, [], 10**30])}).encode(),
        lambda: json.dumps(
            {"messages": random_.choice([[], [3], [{}], "x", [{"role": "x", "content": "y"}]])}
        ).encode(),
        lambda: b'{"prompt": "a", "temperature": NaN}',
        lambda: b'{"prompt": "a", "seed": -5}',
        lambda: b'{"prompt": "\\ud800", "stop": 4}',
        lambda: b'{"prompt": "a", "mode": 5}',
    ]
    return random_.choice(kinds)()


def test_a_thousand_malformed_requests_among_good_ones(address, loaded):
    """None of the bad ones succeeds, none of the good ones is lost."""
    random_ = random.Random(5)
    text, _ = alone(loaded, "ab", 6)
    good = {"prompt": "ab", "max_tokens": 6, "temperature": 0}
    with httpx.Client(timeout=60) as http:
        for number in range(1000):
            path = random_.choice(["/v1/completions", "/v1/chat/completions"])
            answer = http.post(f"{address}{path}", content=garbage(random_))
            assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], answer.text
            if number % 50 == 0:
                assert http.post(f"{address}/v1/completions", json=good).json()["choices"][0]["text"] == text
    host, port = address.removeprefix("http://").split(":")
    for raw in (b"", b"GET", b"\x00" * 50, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw)
    assert httpx.post(f"{address}/v1/completions", json=good).json()["choices"][0]["text"] == text


def test_fifty_clients_at_once(address, loaded):
    """Streams and whole answers, of different modes, each what it is alone."""
    modes = [{"mode": "think"}, {"mode": "adaptive", "exit_threshold": 0.4}, {"width": 8}, {"width": 16}]
    prompts = [f"client {number}" for number in range(50)]

    def ask(number: int) -> str:
        body = {"prompt": prompts[number], "max_tokens": 10, "temperature": 0, **modes[number % 4]}
        if number % 2:
            return httpx.post(f"{address}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
        with httpx.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}, timeout=120) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(ask, range(50)))
    for number, text in enumerate(texts):
        extra = modes[number % 4]
        given = {"exit_threshold": 0.4} if "exit_threshold" in extra else {}
        mode = Mode(extra.get("mode", "think"), extra.get("width"), given)
        assert text == alone(loaded, prompts[number], 10, mode)[0]


def test_a_full_queue_says_so_and_recovers(loaded):
    limits = ServerLimits(new_tokens=200, context=250, slots=1, queue=1)
    body = {"prompt": "a", "max_tokens": 150, "temperature": 0}
    with serving(loaded, limits) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{address}/v1/completions", json=body, timeout=120), range(8)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200 and codes[-1] == 429
        full = next(answer for answer in answers if answer.status_code == 429)
        assert full.json()["error"]["type"] == "rate_limit_error" and full.headers["retry-after"] == "1"
        assert httpx.post(f"{address}/v1/completions", json=body | {"max_tokens": 2}, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_back(loaded, stream):
    limits = ServerLimits(new_tokens=100_000, context=100_100, slots=1, queue=1)
    # it goes round in circles, without an end
    body = {"prompt": "a", "max_tokens": 100_000, "temperature": 0, "stream": stream}
    with serving(loaded, limits) as address:
        if stream:
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/completions", json=body, timeout=2)
        start = time.monotonic()
        short = {"prompt": "b", "max_tokens": 2, "temperature": 0}
        assert httpx.post(f"{address}/v1/completions", json=short, timeout=60).status_code == 200
        # all the tokens would take many times that
        assert time.monotonic() - start < 30


def test_a_batch_that_fails_is_told_and_the_next_runs(loaded):
    """Whatever goes wrong in a step: its requests end with an error, the server goes on."""
    limits = ServerLimits(new_tokens=50, context=250, slots=2, queue=4)
    body = {"prompt": "a", "max_tokens": 5, "temperature": 1.0}
    weight = loaded.model.head.weight.clone()
    with serving(loaded, limits) as address:
        loaded.model.head.weight.fill_(float("nan"))
        try:
            answers = [httpx.post(f"{address}/v1/completions", json=body, timeout=60) for _ in range(4)]
        finally:
            loaded.model.head.weight.copy_(weight)
        assert [answer.status_code for answer in answers] == [500] * 4
        assert answers[0].json()["error"]["type"] == "server_error"
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200


def test_the_page(address):
    page = httpx.get(address).text
    assert '"modes": ["adaptive", "think", "normal", "whisper", "ghost"]' in page and "{{FACTS}}" not in page
    assert httpx.get(f"{address}/nowhere").status_code == 404
