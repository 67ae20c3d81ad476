"""What OpenAI's clients send and expect beyond the plain case: nulls, roles, white space, halves, counts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from http.client import HTTPConnection

import httpx
import openai
import pytest
from inference.served import LIMITS, alone, serving
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.load import load_model


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


GREEDY = {"model": "tiny", "temperature": 0}
HELLO = [{"role": "user", "content": "hi"}]


def test_a_streamed_chat_adds_up_to_a_message(client, loaded):
    """By the official client's own accumulation, and a further turn with what came of it."""
    prompt = "User: hi\nAssistant:"
    # one that is cut at the length is refused by the client itself
    stop = next(letter for letter in alone(loaded, prompt, 12)[0][3:] if letter.isalnum())
    settings = {"messages": HELLO, "n": 2, "max_tokens": 12, "stop": stop, **GREEDY}
    plain = client.chat.completions.create(**settings)
    with client.chat.completions.stream(**settings) as stream:
        final = stream.get_final_completion()
    for ours, theirs in zip(final.choices, plain.choices):
        assert ours.message.role == "assistant" and ours.message.content == theirs.message.content
        assert ours.finish_reason == theirs.finish_reason
    turns = [*HELLO, final.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(messages=turns, max_tokens=2, **GREEDY).usage.completion_tokens == 2


def test_streamed_and_whole_chats_are_the_same_text(address, loaded):
    """Also where it begins and ends with white space: a model that writes little else."""
    weight = loaded.model.head.weight.clone()
    try:
        spaces = loaded.model.head.weight[[*b" \n\ta"]].clone()
        loaded.model.head.weight *= 0.3
        loaded.model.head.weight[[*b" \n\ta"]] = spaces * 2
        pieces = 0
        for seed in range(6):
            body = {"messages": HELLO, "max_tokens": 9, "temperature": 1, "seed": seed}
            whole = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body | {"stream": True}) as answer:
                lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            deltas = [line["choices"][0]["delta"] for line in lines]
            text = whole["choices"][0]["message"]["content"]
            assert "".join(delta["content"] for delta in deltas) == text == text.strip()
            assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
            pieces += len(deltas)
        assert pieces > 12
    finally:
        loaded.model.head.weight.copy_(weight)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_an_id_prompt_that_ends_inside_a_character(client, loaded, stream, echo):
    """Nothing is lost and nothing shown twice, whether its bytes become a character or not."""
    weight = loaded.model.head.weight.clone()
    try:
        for prompt in ([256, 97, 0xC3], [256, 0xF0, 0x9F], [256, 97, 0xFF], [256, 97, 0xE2, 0x82]):
            for favoured in (0xA9, 0x98):
                loaded.model.head.weight.copy_(weight)
                loaded.model.head.weight[[favoured, 0x62]] *= 30
                _, news = alone(loaded, prompt, 6)
                ids = [*prompt, *(new.token for new in news)]
                settings = {"prompt": prompt, "max_tokens": 6, "echo": echo, **GREEDY}
                answer = client.completions.create(stream=stream, **settings)
                pieces = list(answer) if stream else [answer]
                text = "".join(piece.choices[0].text for piece in pieces)
                whole, before = loaded.tokenizer.decode(ids), loaded.tokenizer.decode(prompt)
                if echo:
                    assert text == whole
                else:
                    assert whole.endswith(text) and (whole == before + text or before.endswith("\ufffd"))
                    assert len(text) >= len(whole) - len(before)
    finally:
        loaded.model.head.weight.copy_(weight)


def test_a_prompt_counts_once(client):
    answer = client.completions.create(prompt=["abc", "de"], n=2, max_tokens=3, **GREEDY)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4 + 3, 12)
    chunks = list(
        client.completions.create(
            prompt="abc", n=3, max_tokens=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[-1].usage.prompt_tokens == 4 and chunks[-1].usage.total_tokens == 10


NULLS = (
    "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "user", "metadata", "store", "logit_bias",
    "presence_penalty", "frequency_penalty", "logprobs", "mode", "width", "top_k", "repetition_penalty", "model",
    "service_tier", "reasoning_effort", "something_new",
)  # fmt: skip


def test_null_is_left_out(address):
    """In every field of the API that may be null, in those of ours, and in those that are not known."""
    for path, own in (
        ("completions", {"prompt": "a", "max_tokens": 2, "echo": None, "suffix": None, "best_of": None}),
        ("chat/completions", {"messages": HELLO, "max_completion_tokens": 2, "max_tokens": None, "tools": None}),
    ):
        body = own | dict.fromkeys(NULLS)
        answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 2, answer.text
        # left out alone, not where it says something
        for name in ("service_tier", "something_new"):
            assert httpx.post(f"{address}/v1/{path}", json=body | {name: "x"}).status_code == 400
        for name in ("prompt", "messages"):
            if name in own:
                answer = httpx.post(f"{address}/v1/{path}", json=body | {name: None})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    usage = {
        "prompt": "ab",
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": None},
    }
    assert httpx.post(f"{address}/v1/completions", json=usage).text.count("data: ") == 3


def test_max_tokens_null_is_the_context_that_is_left(loaded):
    """6 at most here, 30 in all; left out it is 16, as OpenAI has it."""
    with serving(loaded, replace(LIMITS, new_tokens=6, context=30)) as address:
        post = lambda path, body: httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
        count = lambda path, body: post(path, body).json()["usage"]["completion_tokens"]
        for length in (3, 26, 29):
            body = {"prompt": [97] * length, "temperature": 0, "max_tokens": None}
            assert count("completions", body) == len(alone(loaded, [97] * length, min(6, 30 - length))[1])
        both = {"prompt": [[97] * 27, [97, 98]], "max_tokens": None, "temperature": 0}
        assert count("completions", both) == sum(
            len(alone(loaded, p, n)[1]) for p, n in (([97] * 27, 3), ([97, 98], 6))
        )
        assert "max_tokens 16: this server makes" not in post("chat/completions", {"messages": HELLO}).text
        assert "max_tokens 16: this server makes at most 6" in post("completions", {"prompt": "a"}).text
        assert "at most 0 are left" in post("completions", {"prompt": [97] * 30, "max_tokens": None}).text


def test_halves_of_pairs_are_cleaned(address, loaded):
    """Wherever text may stand; the escaped halves of a whole pair are the character."""
    want = alone(loaded, "a\ufffdb", 4)[0]
    post = lambda path, raw: httpx.post(
        f"{address}/v1/{path}", content=raw, headers={"Content-Type": "application/json"}
    )
    for raw in (r'"a\ud800b"', r'["a\udc00b"]'):
        answer = post("completions", '{"max_tokens": 4, "temperature": 0, "prompt": ' + raw + "}")
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == want
    whole = post("completions", r'{"max_tokens": 4, "temperature": 0, "prompt": "a\ud83d\ude00"}').json()
    assert whole["choices"][0]["text"] == alone(loaded, "a😀", 4)[0]
    for part in (r'"\ud800"', r'[{"type": "text", "text": "\ud800"}]'):
        answer = post("chat/completions", '{"max_tokens": 2, "messages": [{"role": "user", "content": ' + part + "}]}")
        assert answer.status_code == 200, answer.text
    for field in (r'"stop": "\ud800"', r'"stop": ["x\udfff"]', r'"user": "\ud800"'):
        assert post("completions", '{"prompt": "a", "max_tokens": 2, ' + field + "}").status_code == 200
    for field in (r'"mode": "\ud800"', r'"\ud800": 1', r'"width": "\ud800"', r'"stream_options": "\ud800"'):
        answer = post("completions", '{"prompt": "a", "max_tokens": 2, ' + field + "}")
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_one_model_by_its_name(client, address):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model gpt-5 does not exist; this server has tiny") as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    assert httpx.get(f"{address}/v1/models/a/b").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("body", [b"{", b'{"prompt": "a",}', b'{"prompt": "a" "b"}', b"nonsense", b'{"a": 1e}'])
def test_malformed_json_has_no_param(address, body):
    answer = httpx.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] is None and "is not JSON" in error["message"]


@pytest.mark.parametrize(
    "stop", [["a"] * 5, ["a" * 1001], "a" * 1001, [str(n) for n in range(2000)], [1], [None]], ids=lambda v: str(v)[:20]
)
def test_stops_are_limited(address, stop):
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "stop": stop})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("stop")


def test_four_stops_are_taken(client, loaded):
    text, _ = alone(loaded, "ab", 12)
    answer = client.completions.create(prompt="ab", max_tokens=12, stop=["1", "2", "", text[5]], **GREEDY)
    assert answer.choices[0].text == text[: text.index(text[5])]


VALUES = (
    None, True, False, 0, 1, -1, 2**63, 2**70, 10**40, 0.5, -0.0, 1e308, "", "x", "\ud800", "a" * 3000, [], {}, [[]],
    [None], [1, "a"], {"a": 1}, [[1], [2]], [2**70], ["a", 1], {"type": "text"}, [{"type": "text", "text": 3}],
)  # fmt: skip


def mutated(random_: random.Random) -> tuple[str, bytes]:
    """A good body with some of it changed, so that it is another or none: text, keys or bytes."""
    path = random_.choice(["completions", "chat/completions"])
    body = {"max_tokens": 1, "temperature": 0, "n": 1, "stop": ["q"], "seed": 1, "mode": "think", "stream": False}
    body |= {"prompt": "ab"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    for _ in range(random_.randint(1, 5)):
        name = random_.choice([*body, "echo", "logit_bias", "tools", "stream_options", "best_of", "\udfff", "width"])
        if random_.random() < 0.2:
            body.pop(name, None)
        elif name == "messages" and random_.random() < 0.6:
            body[name] = [{random_.choice(["role", "content", "x"]): random_.choice(VALUES)} for _ in range(2)]
        else:
            body[name] = random_.choice(VALUES)
    raw = bytearray(json.dumps(body).encode())
    for _ in range(random_.choice([0, 0, 1, 3])):
        raw[random_.randrange(len(raw))] = random_.randrange(256)
    return path, bytes(raw)


def test_two_thousand_mutated_bodies(address, loaded):
    """Each is answered as a request or refused as one; the server goes on as before."""
    random_, codes = random.Random(21), []
    # the plain client of the standard library: httpx takes longer than the server
    http = HTTPConnection(address.removeprefix("http://"), timeout=60)
    for _ in range(2000):
        path, raw = mutated(random_)
        http.request("POST", f"/v1/{path}", raw, {"Content-Type": "application/json"})
        answer = http.getresponse()
        told = answer.read()
        assert answer.status in (200, 400, 413), (raw, told)
        if answer.status != 200:
            assert json.loads(told)["error"]["message"]
        codes.append(answer.status)
    good = {"prompt": "ab", "max_tokens": 6, "temperature": 0}
    text = httpx.post(f"{address}/v1/completions", json=good).json()["choices"][0]["text"]
    assert text == alone(loaded, "ab", 6)[0]
    assert codes.count(200) > 20 and codes.count(400) > 1000
