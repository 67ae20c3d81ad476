"""The app behind uvicorn, with all limits on."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Iterable
from functools import partial

import uvicorn

from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.serving.app import make_app
from megatron_adamba.inference.serving.hosts import allowed_hosts
from megatron_adamba.inference.serving.limits import ServerLimits
from megatron_adamba.inference.serving.protocol import TimedProtocol

HEADER_BYTES = 64 * 1024
"""of one request"""


class Server(uvicorn.Server):
    """Tells where it listens, sockets that it is given included."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            logging.getLogger("uvicorn.error").info(
                "Uvicorn running on http://%s:%d (Press CTRL+C to quit)", host, port
            )


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """One for each address that a host has here, all at one port; nobody is listened to yet. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host}: is not known ({reason}); for example --host 127.0.0.1") from None
    sockets: list[socket.socket] = []
    missing = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, (address[0], port, *address[2:])))
        except OSError as error:
            missing = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _not_listened_on(host, port, error) from None
            continue
        port = sockets[0].getsockname()[1]
    if not sockets:
        raise _not_listened_on(host, port, missing)
    return sockets


def listen(sockets: Iterable[socket.socket], host: str, port: int) -> None:
    """Where another has done so since they were bound, that is refused too. Raises ConfigError."""
    for bound in sockets:
        try:
            bound.listen()
        except OSError as error:
            raise _not_listened_on(host, port, error) from None


def _bound(family: int, address: tuple) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _not_listened_on(host: str, port: int, error: OSError | None) -> ConfigError:
    reason = "no address" if error is None else error.strerror
    if error is not None and error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"--host {host}: is no address of this machine; for example --host 127.0.0.1")
    advice = "--port 0 takes a free one"
    return ConfigError(f"--host {host} --port {port}: cannot be listened on ({reason}); {advice}")


def make_server(
    loaded: LoadedModel,
    name: str,
    limits: ServerLimits,
    host: str = "127.0.0.1",
    port: int = 0,
    extra_hosts: Iterable[str] = (),
    log_level: str = "info",
) -> Server:
    """name: what the model is called; host, port: to bind to, 0 being any free port; extra_hosts: names beside the
    machine's own that it answers to. Raises ConfigError."""
    limits.check()
    app = make_app(loaded, name, limits, allowed_hosts(host, extra_hosts))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(TimedProtocol, limits),  # type: ignore[arg-type]  # uvicorn calls it, and needs no class
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
    return Server(config)
