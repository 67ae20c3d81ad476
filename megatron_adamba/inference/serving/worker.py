"""The one thread that runs the model: requests queue up, share the batch, and get their tokens as they are made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_adamba.errors import AdambaError
from megatron_adamba.inference.generate import Generation, GenerationRequest, NewToken, Sequence
from megatron_adamba.inference.serving.fair_queue import FairQueue, Shares

Listener = Callable[["Event | Exception"], None]
"""called in the worker's thread with each token, or with what went wrong; must not wait"""


@dataclass(frozen=True)
class Event:
    """A token."""

    new: NewToken
    sequence: Sequence | None = None
    """beside the first token: what the prompt took"""


@dataclass
class Ticket:
    """A request on its way."""

    request: GenerationRequest
    listener: Listener
    client: str
    number: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFull(AdambaError):
    """As many requests wait as may."""


class Worker:
    """Runs a `Generation` in a thread of its own; clients take turns at its slots. Between two steps of the texts that
    run, no more than one piece of one prompt is read: they go on at a steady pace, whatever else arrives."""

    def __init__(self, generation: Generation, queue_size: int, share: int | None = None) -> None:
        """queue_size: requests that may wait for a slot; share: of one client; None: all."""
        self.generation, self.queue_size, self.share = generation, queue_size, share or queue_size
        self._queue: FairQueue[Ticket] = FairQueue()
        self._slots = Shares(len(generation.free))
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        """of requests that have a slot"""
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self.log = logging.getLogger("megatron_adamba")

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finishes the step that is under way; requests that still run end with an error."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def submit(self, request: GenerationRequest, listener: Listener, client: str = "") -> Ticket:
        """client: whose turn it takes. Raises ConfigError for what can never run, QueueFull."""
        request.check(self.generation.capacity)
        ticket = Ticket(request, listener, client)
        with self._lock:
            self._queue.keep(lambda waiting: not waiting.cancelled.is_set())
            if len(self._queue) >= self.queue_size:
                raise QueueFull(f"{self.queue_size} requests wait already; try again later")
            if self._queue.waiting(client) >= self.share:
                raise QueueFull(f"{self.share} requests of this client wait already; try again later")
            self._queue.put(client, ticket)
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody listens any more; its slot is free from the next step on."""
        ticket.cancelled.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._drop_cancelled()
            read = self._read_on()
            if self.generation.running:
                self._step()
            elif not read:
                self._wake.wait()
                self._wake.clear()
        self._end_all(RuntimeError("the server is stopping"))

    def _drop_cancelled(self) -> None:
        for number, ticket in list(self._tickets.items()):
            if ticket.cancelled.is_set():
                self.generation.cancel(number)
                self._leave(number)

    def _read_on(self) -> bool:
        """A further piece of the prompt that is being read, or the first of the next one; whether there was any."""
        number = next(iter(self.generation.reading), None)
        if number is None:
            number = self._admit()
        if number is None:
            return False
        try:
            first = self.generation.read_on(number)
        except Exception as error:
            self._failed(self._leave(number), error)
            return True
        if first is not None:
            sequence, new = first
            ticket = self._tickets[number] if new.finish is None else self._leave(number)
            self._tell(ticket, Event(new, sequence))
        return True

    def _admit(self) -> int | None:
        """Give the next request a slot; returns its number, None where nothing waits that may have one."""
        while self.generation.free:
            with self._lock:
                found = self._queue.pop(self._slots.may_take)
            if found is None:
                return None
            _, ticket = found
            if ticket.cancelled.is_set():
                continue
            try:
                number = self.generation.begin(ticket.request)
            except Exception as error:
                self._failed(ticket, error)
                continue
            self._tickets[number] = ticket
            self._slots.take(ticket.client)
            return number
        return None

    def _leave(self, number: int) -> Ticket:
        """A request has no slot any more."""
        ticket = self._tickets.pop(number)
        self._slots.give_back(ticket.client)
        return ticket

    def _step(self) -> None:
        try:
            news = self.generation.step()
        except Exception as error:
            # what the batch held is lost; the server goes on
            self._end_all(error)
            return
        for new in news:
            ticket = self._tickets[new.number] if new.finish is None else self._leave(new.number)
            self._tell(ticket, Event(new))

    def _end_all(self, error: Exception) -> None:
        for number in (*self.generation.running, *self.generation.reading):
            self.generation.cancel(number)
        with self._lock:
            waiting = self._queue.clear() if self._stop.is_set() else []
        for ticket in (*map(self._leave, list(self._tickets)), *waiting):
            self._failed(ticket, error)

    def _failed(self, ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, AdambaError):
            self.log.error("a request failed: %s", error, exc_info=error)
        self._tell(ticket, error)

    def _tell(self, ticket: Ticket, event: Event | Exception) -> None:
        try:
            ticket.listener(event)
        except Exception as error:
            # its client's loop is gone
            self.log.info("nobody listens to a request any more: %s", error)
            ticket.cancelled.set()
