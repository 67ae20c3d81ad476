"""Clients that take more than their share, by raw sockets: slow ones, silent ones, greedy ones, ones from elsewhere."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
from commands.test_small_tools import ROOT
from inference.served import LIMITS, alone, serving
from surgery.test_gates_carried import gated_source

from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.serving.fair_queue import FairQueue
from megatron_adamba.inference.serving.hosts import allowed_hosts, host_of
from megatron_adamba.inference.serving.limits import ServerLimits
from megatron_adamba.inference.serving.server import bound_sockets, listen

QUICK = replace(LIMITS, request_seconds=0.6, shutdown_seconds=0.5)
GOOD = b"Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, "fp32")


@pytest.fixture(scope="module")
def address(loaded):
    with serving(loaded, QUICK) as address:
        yield address


def connect(address: str, timeout: float = 10) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


SLOW = {
    "nothing": [b""],
    "half a line": [b"POST /v1/comp"],
    "half of the headers": [b"POST /v1/completions HTTP/1.1\r\n" + GOOD],
    "half of the body": [b"POST /v1/completions HTTP/1.1\r\n" + GOOD + b"Content-Length: 50\r\n\r\n{"],
    "half of a chunk": [b"POST /v1/completions HTTP/1.1\r\n" + GOOD + b"Transfer-Encoding: chunked\r\n\r\n20\r\n{"],
    "a body for a path that is not there": [b"POST /nowhere HTTP/1.1\r\n" + GOOD + b"Content-Length: 50\r\n\r\n{"],
    "a second request": [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea"],
    "headers drop by drop": [bytes([byte]) for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: 123456789"],
    "a body drop by drop": [
        b"POST /v1/completions HTTP/1.1\r\n" + GOOD + b"Content-Length: 500\r\n\r\n",
        *[b" "] * 40,
    ],
}


@pytest.mark.parametrize("kind", SLOW)
def test_what_does_not_arrive_is_not_waited_for(address, kind):
    start = time.monotonic()
    with connect(address) as connection:
        try:
            for part in SLOW[kind]:
                connection.sendall(part)
                time.sleep(0.06)
        except (BrokenPipeError, ConnectionResetError):
            pass
        told = everything(connection)
    assert time.monotonic() - start < 5
    if kind not in ("nothing", "a second request", "a body for a path that is not there", "headers drop by drop"):
        assert b"HTTP/1.1 408" in told or kind.endswith("drop by drop"), told
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


def test_a_request_in_time_is_answered_however_long_it_takes(loaded):
    """The clock is the sender's alone."""
    limits = replace(QUICK, new_tokens=400, context=500)
    with serving(loaded, limits) as address:
        body = {"prompt": "a", "max_tokens": 300, "temperature": 1, "seed": 3, "mode": "think"}
        start = time.monotonic()
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        if answer.json()["usage"]["completion_tokens"] == 300:
            assert time.monotonic() - start > limits.request_seconds


def test_many_connections_that_say_nothing(loaded):
    """More than there may be: the rest is told so, and they go by themselves."""
    with serving(loaded, replace(QUICK, connections=20)) as address:
        held = [connect(address) for _ in range(30)]
        try:
            assert httpx.get(f"{address}/health").status_code == 503
            time.sleep(1.5)
            assert httpx.get(f"{address}/health").status_code == 200
        finally:
            for connection in held:
                connection.close()


def test_answers_that_nobody_reads_end(address):
    """They fill the buffers between the two, and the connection is cut."""
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    page = len(httpx.get(address).content)
    with connect(address) as connection:
        with suppress(TimeoutError, ConnectionError):
            connection.sendall(asked * 6000)
        time.sleep(1.5)
        told = everything(connection)
        assert len(told) < 6000 * page
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


@pytest.mark.parametrize("read", [False, True])
def test_a_server_that_is_stopped_does_not_wait_for_streams(folder, read):
    """SIGTERM to the real one; a stream without an end, read or not."""
    words = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", str(folder), "--port", "0"]
    words += ["--new-tokens", "100000", "--context", "100100", "--shutdown-seconds", "1", "--dtype", "fp32"]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if "Uvicorn running on" in line)
        address = line.split("running on ")[1].split()[0]
        body = json.dumps({"prompt": "a", "max_tokens": 100_000, "temperature": 0, "stream": True}).encode()
        with connect(address) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\n" + GOOD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
            start = time.monotonic()
            server.send_signal(signal.SIGTERM)
            if read:
                everything(connection)
            assert server.wait(20) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            assert time.monotonic() - start < 12
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("host", "code"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:8000", 200),
        (b"127.0.0.1:1", 200),
        (b"[::1]:8000", 200),
        (b"evil.example", 400),
        (b"localhost.evil.example:8000", 400),
        (b"evil.example@localhost", 400),
        (b"127.0.0.1.nip.io", 400),
        (b"10.0.0.1", 400),
        (b"", 400),
        (b"localhost:99999999", 400),
        (b"[::1", 400),
    ],
)
def test_names_of_others_are_not_answered_to(address, host, code):
    for path in (b"/health", b"/", b"/v1/models"):
        with connect(address) as connection:
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            told = everything(connection)
        assert told.startswith(f"HTTP/1.1 {code}".encode()), told
        assert code == 200 or b"--allow-host" in told


def test_names_that_are_allowed(loaded):
    ask = lambda address, host: httpx.get(f"{address}/health", headers={"Host": host}).status_code
    with serving(loaded, QUICK, extra_hosts=["GPU1.example.org"]) as address:
        assert [ask(address, host) for host in ("gpu1.example.org:80", "10.0.0.1", "localhost")] == [200] * 3
        assert ask(address, "gpu2.example.org") == 400
    with serving(loaded, QUICK, extra_hosts=["*"]) as address:
        assert ask(address, "whatever") == 200
    assert "machine" in allowed_hosts("machine") and host_of("[fe80::1]:80") == "fe80::1"
    for name in ("a:80", "http://a", "a/b", ""):
        with pytest.raises(ConfigError, match="--allow-host"):
            allowed_hosts("0.0.0.0", [name])


def test_clients_take_turns():
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        queue.put("greedy", number)
    queue.put("second", 10)
    queue.put("third", 20)
    queue.put("second", 11)
    order = [queue.pop(lambda client: True)[1] for _ in range(len(queue))]
    assert order == [0, 10, 20, 1, 11, 2, 3] and queue.pop(lambda client: True) is None
    queue.put("greedy", 4)
    queue.put("second", 12)
    assert queue.pop(lambda client: client != "greedy") == ("second", 12) and queue.waiting("greedy") == 1
    queue.keep(lambda number: number != 4)
    assert len(queue) == 0 and queue.clear() == []


def test_one_client_with_many_texts_leaves_room_for_others(loaded):
    """Sixteen long texts of one request; a short one of another is answered long before they are."""
    limits = ServerLimits(new_tokens=60, context=200, slots=4, queue=32, choices=16)
    finished = []

    def listen(address: str) -> None:
        body = {"prompt": "a", "max_tokens": 60, "n": 16, "temperature": 2, "seed": 1, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as answer:
            lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
            finished.extend(line for line in lines if line["choices"][0]["finish_reason"])

    with serving(loaded, limits) as address, ThreadPoolExecutor(1) as pool:
        greedy = pool.submit(listen, address)
        time.sleep(0.3)
        short = {"prompt": "b", "max_tokens": 2, "temperature": 0}
        for _ in range(2):
            answer = httpx.post(f"{address}/v1/completions", json=short, timeout=60)
            assert answer.json()["choices"][0]["text"] == alone(loaded, "b", 2)[0]
        assert len(finished) < 8
        greedy.result()
    assert len(finished) == 16


def test_one_client_cannot_fill_the_queue(loaded):
    """What it has too much of is refused; another's is not."""
    limits = ServerLimits(new_tokens=100, context=200, slots=1, queue=4, choices=8)
    with serving(loaded, limits) as address, ThreadPoolExecutor(1) as pool:
        post = lambda body: httpx.post(f"{address}/v1/completions", json=body, timeout=120).status_code
        greedy = {"prompt": "a", "max_tokens": 100, "temperature": 2}
        assert post(greedy | {"n": 9}) == 400
        busy = pool.submit(post, greedy | {"n": 5})
        time.sleep(0.2)
        assert [post({"prompt": "b", "max_tokens": 1, "temperature": 0}) for _ in range(2)] == [200] * 2
        assert busy.result() in (200, 429)
        assert post(greedy | {"n": 3, "max_tokens": 2}) == 200


def test_a_port_in_use_is_refused_before_the_model_is_read(adamba, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = adamba("serve", "--model", tmp_path / "nowhere", "--port", port)
    message = f"error: --host 127.0.0.1 --port {port}: cannot be listened on (Address already in use); --port 0 takes a"
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1


def test_a_port_that_is_taken_meanwhile_is_refused_too():
    sockets = bound_sockets("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"--port {port}: cannot be list"):
        listen(sockets, "127.0.0.1", port)
    sockets[0].close()


def test_all_addresses_of_a_name_have_one_port():
    sockets = bound_sockets("localhost", 0)
    assert len({bound.getsockname()[1] for bound in sockets}) == 1
    for bound in sockets:
        bound.close()
