"""The app behind uvicorn, with all limits on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import uvicorn

from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.serving.app import make_app
from megatron_adamba.inference.serving.hosts import allowed_hosts
from megatron_adamba.inference.serving.limits import ServerLimits
from megatron_adamba.inference.serving.protocol import TimedProtocol

HEADER_BYTES = 64 * 1024
"""of one request"""


def make_server(
    loaded: LoadedModel,
    name: str,
    limits: ServerLimits,
    host: str = "127.0.0.1",
    port: int = 0,
    extra_hosts: Iterable[str] = (),
    log_level: str = "info",
) -> uvicorn.Server:
    """name: what the model is called; host, port: to bind to, 0 being any free port; extra_hosts: names beside the
    machine's own that it answers to. Raises ConfigError."""
    limits.check()
    app = make_app(loaded, name, limits, allowed_hosts(host, extra_hosts))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(TimedProtocol, limits),
        ws="none",
        log_level=log_level,
        access_log=False,
        # a header that anybody can send must not name the client
        proxy_headers=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=HEADER_BYTES,
        # connections end by themselves before that
        timeout_graceful_shutdown=math.ceil(limits.shutdown_seconds) + 2,
    )
    return uvicorn.Server(config)
