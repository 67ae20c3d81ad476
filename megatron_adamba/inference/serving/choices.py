"""Sequences of one HTTP request: submitted together, heard one by one, dropped when the client goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.generate import GenerationRequest
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.serving.worker import Event, Ticket, Worker

_LOOK_AFTER_CLIENT = 1.0
"""seconds after which it is asked again whether the client is still there"""


@dataclass
class Choice:
    """One text of a request."""

    index: int
    request: GenerationRequest
    meter: ComputeMeter
    first: bool = True
    """of its prompt"""
    text: str = ""
    finish: str | None = None
    exit_layers: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    """of each token, as a share of the whole model's"""
    prompt_flops: int = 0

    def take(self, event: Event) -> dict:
        """Note a token; returns what it took."""
        new = event.new
        if event.sequence is not None:
            exits, widened = event.sequence.prompt_exits.tolist(), event.sequence.prompt_widened.tolist()
            self.prompt_flops = self.meter.total(exits, widened)
        self.text += new.text
        self.finish = new.finish
        self.exit_layers.append(new.exit_layer)
        self.widths.append(round(self.meter.mean_width(new.exit_layer, new.widened_at)))
        self.compute.append(self.meter.of(new.exit_layer, new.widened_at) / self.meter.full)
        return {"exit_layer": self.exit_layers[-1], "width": self.widths[-1], "compute": round(self.compute[-1], 4)}

    @property
    def saved(self) -> float:
        """Share of the whole model's compute that prompt and text did without."""
        # the last token of the prompt made the first of the text, and the last of the text was never fed
        spent = self.prompt_flops + sum(share * self.meter.full for share in self.compute[1:])
        whole = self.meter.full * (len(self.request.prompt) + len(self.compute) - 1)
        return 1 - spent / whole


def make_choices(loaded: LoadedModel, requests: Sequence[GenerationRequest], n: int, predicted: bool) -> list[Choice]:
    """n of each request, their seeds one after the other."""
    choices: list[Choice] = []
    for request in requests:
        length = len(request.prompt) + request.max_new_tokens
        meter = ComputeMeter(loaded.model.config, request.policy, length, predicted)
        for number in range(n):
            own = replace(request, sampling=replace(request.sampling, seed=request.sampling.seed + number))
            choices.append(Choice(len(choices), own, meter, number == 0))
    return choices


def _pass_on(
    loop: asyncio.AbstractEventLoop,
    events: asyncio.Queue[tuple[Choice, Event | Exception]],
    choice: Choice,
    event: Event | Exception,
) -> None:
    """From the worker's thread."""
    loop.call_soon_threadsafe(events.put_nowait, (choice, event))


async def run_choices(
    worker: Worker, choices: Sequence[Choice], is_gone, client: str = ""
) -> AsyncGenerator[tuple[Choice, Event], None]:
    """Tokens of all as they are made. Whoever stops listening, or raises, takes them all back.

    client: whose turns they take; is_gone: coroutine function that tells whether the client has left. Raises QueueFull,
    and what went wrong in a sequence.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[Choice, Event | Exception]] = asyncio.Queue()
    tickets: list[Ticket] = []
    try:
        for choice in choices:
            heard = partial(_pass_on, loop, events, choice)
            tickets.append(worker.submit(choice.request, heard, client))
        left, looked = len(choices), time.monotonic()
        while left:
            if time.monotonic() - looked > _LOOK_AFTER_CLIENT:
                looked = time.monotonic()
                if await is_gone():
                    return
            try:
                choice, event = await asyncio.wait_for(events.get(), _LOOK_AFTER_CLIENT)
            except TimeoutError:
                continue
            if isinstance(event, Exception):
                raise event
            left -= event.new.finish is not None
            yield choice, event
    finally:
        for ticket in tickets:
            worker.cancel(ticket)
