"""HTTP connections that cannot be held for nothing: uvicorn's, with limits on how long either side may take."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_adamba.inference.serving.limits import ServerLimits, error_body


class TimedProtocol(H11Protocol):
    """A request must have arrived as a whole, and an answer must be read on, within so many seconds."""

    def __init__(self, limits: ServerLimits, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.limits = limits
        self._arrival: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    # as in uvicorn, whose transports are written to; asyncio's type of a protocol asks for less
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_arrival()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(self.limits.request_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def shutdown(self) -> None:
        """What is under way has some seconds more, a client that does not read none."""
        super().shutdown()
        unread = self.flow.write_paused or self.transport.get_write_buffer_size() > 0
        self.loop.call_later(0 if unread else self.limits.shutdown_seconds, self.transport.abort)

    def _watch_arrival(self) -> None:
        """Start the clock where a request is expected or under way, stop it where one is whole."""
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()
        if arriving and self._arrival is None:
            self._arrival = self.loop.call_later(self.limits.request_seconds, self._too_slow)
        elif not arriving and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        begun = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            message = f"the request did not arrive within {self.limits.request_seconds:g} seconds"
            self._refuse(408, message)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, msg)
        self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(error_body(message, "invalid_request_error")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        if self.cycle is not None:
            # nobody else answers any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
