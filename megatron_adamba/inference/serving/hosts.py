"""Which names a server answers to.

A page of any site can let its own name point to this machine (DNS rebinding) and then read what the server says; the
browser still sends the site's name as `Host` (RFC 9110, section 7.2).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.serving.limits import error_body

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY = "*"


def allowed_hosts(bound: str, extra: Iterable[str] = ()) -> frozenset[str]:
    """Names that a server bound to `bound` answers to: the machine's own, and `extra`; `*` among them is every name.
    Raises ConfigError for one that is no name."""
    own = {bound.lower()} if bound not in ("0.0.0.0", "::", "") else {socket.gethostname().lower()}
    for name in extra:
        if name != ANY and host_of(name) != name.lower().strip("[]"):
            raise ConfigError(f"--allow-host {name}: is no host name (no port, no path); for example gpu1.example.org")
    return frozenset(LOOPBACK | own | {name.lower().strip("[]") for name in extra})


def host_of(header: str) -> str | None:
    """`name`, `name:port` or `[address]:port` without its port, in lower case; None where it is none of these."""
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == header and "@" not in header else None


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HostCheck:
    """ASGI middleware: requests for other names are answered with 400. A server that others reach (`allowed` holds more
    than loopback names) also answers to addresses, which no site can have as its name."""

    def __init__(self, app, allowed: frozenset[str]) -> None:
        self.app, self.allowed = app, allowed
        self.addresses = bool(allowed - LOOPBACK)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            message = "this server does not answer to that Host; start it with --allow-host NAME to allow one"
            answer = JSONResponse(error_body(message, "invalid_request_error"), 400, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_allowed(self, scope) -> bool:
        if ANY in self.allowed:
            return True
        host = host_of(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        return host is not None and (host in self.allowed or (self.addresses and is_address(host)))
