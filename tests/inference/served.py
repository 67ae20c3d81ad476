"""A server in a thread of its own, and what a request gives without one."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.serving.limits import ServerLimits
from megatron_adamba.inference.serving.server import make_server

LIMITS = ServerLimits(body_bytes=20_000, new_tokens=64, context=300, slots=4, queue=64, choices=4)


@contextmanager
def serving(loaded, limits: ServerLimits, name: str = "tiny", **settings):
    """Address of a server in a thread of its own."""
    server = make_server(loaded, name, limits, log_level="critical", **settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def alone(loaded, prompt, count: int, mode: Mode | None = None, sampling: Sampling | None = None, **settings):
    """Text and finish of a request without a server."""
    ids = prompt if isinstance(prompt, list) else [256, *prompt.encode()]
    policy = (mode or Mode("think")).policy(loaded, ids)
    generation = Generation(loaded, 1, 300)
    request = GenerationRequest(tuple(ids), policy, count, sampling or Sampling(), **settings)
    news = [generation.add(request)[1]]
    while generation.running:
        news += generation.step()
    return "".join(new.text for new in news), news
