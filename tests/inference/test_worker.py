"""The server's thread by itself: what it reads between two steps, whose turn it is, what fails and is dropped."""

from __future__ import annotations

import queue

import pytest
import torch
from inference.decoding import loaded_model, random_gates, random_model

from megatron_adamba.elastic.plan import full_plan, uniform_plan
from megatron_adamba.inference.generate import PIECE, Generation, GenerationRequest
from megatron_adamba.inference.policy import AdaptivePolicy, ComputePolicy
from megatron_adamba.inference.serving.worker import Worker

LONG = 3 * PIECE + 5


@pytest.fixture(scope="module")
def loaded():
    model = random_model(block_pattern="TM", gate_size=8)
    return loaded_model(model, random_gates(model))


def request(loaded, length: int, count: int, **changes) -> GenerationRequest:
    prompt = tuple(place % 37 for place in range(length))
    policy = ComputePolicy(uniform_plan(loaded.model.config, 32))
    return GenerationRequest(prompt, policy, count, stop_at_eod=False, **changes)


class Noted(Generation):
    """Notes what it does."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.did: list[str] = []

    def step(self):
        self.did.append("step")
        return super().step()

    def _prefill(self, slot, tokens):
        self.did.append(f"read {len(tokens)}")
        return super()._prefill(slot, tokens)


def run_all(generation: Generation, requests: list[tuple[str, GenerationRequest]]) -> list[tuple[str, object]]:
    """(client, event) in order, of requests that all wait when the worker begins."""
    worker, events = Worker(generation, 64), queue.Queue()
    left = len(requests)
    for client, wanted in requests:
        worker.submit(wanted, lambda event, client=client: events.put((client, event)), client)
    worker.start()
    told = []
    while left:
        told.append(events.get(timeout=60))
        event = told[-1][1]
        left -= isinstance(event, Exception) or event.new.finish is not None
    worker.stop()
    assert sorted(generation.free) == list(range(len(generation.free))) and not generation.reading
    return told


@pytest.mark.parametrize("count", [1, 2])
def test_texts_go_on_between_the_prompts_of_others(loaded, count):
    """Twelve long prompts for a token or two each, beside a text that runs: a step behind every piece of them."""
    generation = Noted(loaded, 8, LONG + 100)
    asked = [("steady", request(loaded, 3, 60)), *[("greedy", request(loaded, LONG, count))] * 12]
    told = run_all(generation, asked)
    reads = [place for place, did in enumerate(generation.did) if did.startswith("read")]
    assert len(reads) == 1 + 12 * 4 and max(int(did[5:]) for did in generation.did if did[0] == "r") == PIECE
    steady = [place for place, (client, _) in enumerate(told) if client == "steady"]
    assert len(steady) == 60
    # while it runs, no two pieces stand beside each other
    assert all(generation.did[place - 1] == "step" for place in reads[1:])


def test_clients_take_turns_at_prompts(loaded):
    asked = [*[("greedy", request(loaded, LONG, 1))] * 4, ("other", request(loaded, 5, 1))]
    told = run_all(Noted(loaded, 4, LONG + 100), asked)
    assert [client for client, _ in told] == ["greedy", "other", "greedy", "greedy", "greedy"]


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, PIECE + 1, LONG])
def test_a_prompt_in_pieces_is_the_prompt(loaded, length):
    """What a text is made of, exits and widths of its prompt included."""
    plan = full_plan(loaded.model.config)
    for policy in (ComputePolicy(plan), ComputePolicy(plan, AdaptivePolicy(0.5, 0.4))):
        wanted = GenerationRequest(request(loaded, length, 4).prompt, policy, 4, stop_at_eod=False)
        whole = Generation(loaded, 1, LONG + 10)
        whole.decoder.begin(0, policy)
        decoded = whole.decoder.prefill(0, torch.tensor(wanted.prompt))
        sequence, new = Generation(loaded, 1, LONG + 10).add(wanted)
        assert new.token == int(decoded.logits[0].argmax())
        assert torch.equal(sequence.prompt_exits, decoded.exit_layers)
        assert torch.equal(sequence.prompt_widened, decoded.widened_at)


def test_tokens_that_leave_together_are_read_together(loaded):
    policy = ComputePolicy(full_plan(loaded.model.config), AdaptivePolicy(0.5, exit_per="sequence"))
    generation = Noted(loaded, 1, LONG + 10)
    generation.add(GenerationRequest(request(loaded, LONG, 1).prompt, policy, 1))
    assert generation.did == [f"read {LONG}"]


def test_a_prompt_that_is_dropped_or_fails_gives_its_place_back(loaded):
    class Failing(Noted):
        def _prefill(self, slot, tokens):
            if len(tokens) == 7:
                raise RuntimeError("no more memory")
            return super()._prefill(slot, tokens)

    generation = Failing(loaded, 1, LONG + 100)
    number = generation.begin(request(loaded, LONG, 3))
    assert generation.read_on(number) is None and not generation.free
    generation.cancel(number)
    assert generation.free == [0] and not generation.kept
    told = run_all(
        generation, [("a", request(loaded, 7, 1)), ("b", request(loaded, 7, 1)), ("a", request(loaded, 3, 1))]
    )
    assert [isinstance(event, Exception) for _, event in told] == [True, True, False]
