"""Generation: requests in the slots of a decoder, a token each at every step, joining and leaving as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_adamba.config.rules import positive
from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.decoder import Decoded, Decoder
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.policy import ComputePolicy
from megatron_adamba.inference.sampling import Sampling, choose
from megatron_adamba.inference.text_stream import TextStream


@dataclass(frozen=True)
class GenerationRequest:
    """What to go on from, and how far."""

    prompt: tuple[int, ...]
    """token ids, at least one"""
    policy: ComputePolicy
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """strings that end the text, themselves left out"""
    stop_at_eod: bool = True
    echoed: bool = False
    """the text follows on `finished_text` of the prompt: what that leaves out at the end is shown with it"""

    def check(self, capacity: int) -> None:
        """Raises ConfigError."""
        positive("--max-new-tokens", self.max_new_tokens)
        self.sampling.check()
        if not self.prompt:
            raise ConfigError("--prompt: is empty; give at least one token of text")
        if len(self.prompt) + self.max_new_tokens > capacity:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}: with a prompt of {len(self.prompt)} tokens that is more than "
                f"the {capacity} of this context; at most {max(capacity - len(self.prompt), 0)} are left"
            )


@dataclass(frozen=True)
class NewToken:
    """One token of one request."""

    number: int
    """of the request"""
    token: int
    text: str
    """what has become certain; may be empty"""
    exit_layer: int
    """blocks that ran for it"""
    widened_at: int
    """first block at the doubled width, the number of blocks for none"""
    finish: str | None
    """None | stop | length"""


PIECE = 256
"""tokens of a prompt that are read in one go: few enough that texts in other slots can wait for them"""


@dataclass
class _Prompt:
    """A request that has a slot, and whose prompt is read in pieces."""

    slot: int
    request: GenerationRequest
    traces: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """exit layers and widenings of the tokens that were read"""
    read: int = 0

    def next_piece(self) -> tuple[int, ...]:
        """Where tokens that arrive together leave together, a prompt arrives as one."""
        adaptive = self.request.policy.adaptive
        whole = adaptive is not None and adaptive.exit_per == "sequence"
        return self.request.prompt[self.read :] if whole else self.request.prompt[self.read : self.read + PIECE]


@dataclass
class Sequence:
    """A request that has a slot, and whose prompt is read."""

    number: int
    slot: int
    request: GenerationRequest
    generator: torch.Generator
    stream: TextStream
    tokens: list[int]
    """prompt and what was made so far; of the last one nothing is cached yet"""
    prompt_exits: Tensor
    """[prompt] int64 blocks that ran for each token of the prompt"""
    prompt_widened: Tensor
    made: int = 0
    finish: str | None = None


class Generation:
    """Runs requests side by side on one loaded model. Not safe for threads."""

    def __init__(self, loaded: LoadedModel, slots: int, capacity: int) -> None:
        """capacity: tokens of the longest sequence, prompt included."""
        self.loaded, self.capacity = loaded, capacity
        self.decoder = Decoder(loaded.model, slots, capacity, loaded.gates, loaded.reading)
        self.free = list(range(slots))
        self.reading: dict[int, _Prompt] = {}
        self.running: dict[int, Sequence] = {}
        self.kept: dict[int, Sequence] = {}
        """finished ones whose caches are still there"""
        self._numbers = 0
        self._ends = loaded.end_ids

    def add(self, request: GenerationRequest) -> tuple[Sequence, NewToken]:
        """Read the prompt and make the first token. Needs a free slot. Raises ConfigError."""
        number = self.begin(request)
        while (first := self.read_on(number)) is None:
            pass
        return first

    def begin(self, request: GenerationRequest) -> int:
        """Give a request a slot, which must be free; returns its number. Its prompt is to be read. Raises
        ConfigError."""
        request.check(self.capacity)
        self._check_ids(request)
        slot = self.free.pop(0)
        self.kept = {number: kept for number, kept in self.kept.items() if kept.slot != slot}
        number, self._numbers = self._numbers, self._numbers + 1
        with self._given_back_on_failure(number, slot):
            self.decoder.begin(slot, request.policy)
            self.reading[number] = _Prompt(slot, request)
        return number

    def read_on(self, number: int) -> tuple[Sequence, NewToken] | None:
        """Read a further piece of a prompt that was begun; behind the last one comes the first token. Steps may run in
        between."""
        prompt = self.reading[number]
        slot, request = prompt.slot, prompt.request
        with self._given_back_on_failure(number, slot):
            piece = prompt.next_piece()
            decoded = self._prefill(slot, piece)
            prompt.read += len(piece)
            prompt.traces.append((decoded.exit_layers.cpu(), decoded.widened_at.cpu()))
            if prompt.read < len(request.prompt):
                return None
            del self.reading[number]
            generator = torch.Generator(device=self.loaded.device).manual_seed(request.sampling.seed)
            stream = TextStream(self.loaded.tokenizer, request.prompt, request.stop, request.echoed)
            exits, widened = (torch.cat(parts) for parts in zip(*prompt.traces))
            sequence = Sequence(number, slot, request, generator, stream, list(request.prompt), exits, widened)
            self.running[number] = sequence
            return sequence, self._take(sequence, decoded, -1)

    def go_on(self, number: int, request: GenerationRequest) -> NewToken:
        """A further turn of a finished request whose slot nobody has taken since: its caches stay, the prompt follows
        on what was made. Raises ConfigError, and the caches still stay; where anything else fails they are lost."""
        sequence = self.kept[number]
        prompt = (sequence.tokens[-1], *request.prompt)
        replace(request, prompt=(*sequence.tokens, *request.prompt)).check(self.capacity)
        self._check_ids(request)
        del self.kept[number]
        with self._given_back_on_failure(number, sequence.slot):
            self.decoder.change_policy(sequence.slot, request.policy)
            decoded = self._prefill(sequence.slot, prompt)
            self.free.remove(sequence.slot)
            sequence.request, sequence.made, sequence.finish = request, 0, None
            sequence.generator.manual_seed(request.sampling.seed)
            sequence.stream = TextStream(self.loaded.tokenizer, request.prompt, request.stop)
            sequence.tokens += request.prompt
            self.running[number] = sequence
            return self._take(sequence, decoded, -1)

    @contextmanager
    def _given_back_on_failure(self, number: int, slot: int) -> Iterator[None]:
        """A request that fails leaves its slot free, and caches that nobody can go on from."""
        try:
            yield
        except BaseException:
            for held in (self.reading, self.running, self.kept):
                held.pop(number, None)
            if slot not in self.free:
                self.free.insert(0, slot)
            raise

    def step(self) -> list[NewToken]:
        """A further token of every running request."""
        sequences = list(self.running.values())
        if not sequences:
            return []
        sequences.sort(key=lambda sequence: sequence.slot)
        tokens = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=self.loaded.device)
        decoded = self.decoder.step([sequence.slot for sequence in sequences], tokens)
        return [self._take(sequence, decoded, place) for place, sequence in enumerate(sequences)]

    def cancel(self, number: int) -> None:
        """Give a request's slot back."""
        prompt = self.reading.pop(number, None)
        if prompt is not None:
            self.free.append(prompt.slot)
        sequence = self.running.pop(number, None)
        if sequence is not None:
            self.free.append(sequence.slot)
            self.kept[number] = sequence

    def _check_ids(self, request: GenerationRequest) -> None:
        known = min(self.loaded.tokenizer.vocab_size, self.loaded.model.config.vocab_size)
        worst = next((token for token in request.prompt if not 0 <= token < known), None)
        if worst is not None:
            raise ConfigError(f"--prompt: token id {worst} is not in the vocabulary of {known}")

    def _prefill(self, slot: int, tokens: tuple[int, ...]) -> Decoded:
        return self.decoder.prefill(slot, torch.tensor(tokens, device=self.loaded.device))

    def _take(self, sequence: Sequence, decoded: Decoded, place: int) -> NewToken:
        """Choose a sequence's next token from the logits in its place."""
        request = sequence.request
        # rows of the model's vocabulary beyond the tokenizer's are padding
        logits = decoded.logits[place][None, : self.loaded.tokenizer.vocab_size]
        seen = None
        if request.sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        token = int(choose(logits, request.sampling, sequence.generator, seen))
        sequence.tokens.append(token)
        sequence.made += 1
        ends = request.stop_at_eod and token in self._ends
        text = "" if ends else sequence.stream.push(token)
        if sequence.stream.stopped or ends:
            sequence.finish = "stop"
        elif sequence.made == request.max_new_tokens:
            sequence.finish = "length"
        if sequence.finish is not None:
            text += sequence.stream.finish()
            self.cancel(sequence.number)
        trace = int(decoded.exit_layers[place]), int(decoded.widened_at[place])
        return NewToken(sequence.number, token, text, *trace, sequence.finish)
