"""A trained model: text at any of its widths, and what a text costs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_adamba.api.wording import naming_arguments, reworded
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.rules import count
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.errors import AdambaError, ConfigError
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.load import LoadedModel, load_model
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.text_stream import clean_text


@dataclass(frozen=True)
class Token:
    """A token of a text that is made."""

    id: int
    text: str
    """what has become certain with it; may be empty"""
    exit_layer: int
    """blocks that ran for it"""
    compute: float
    """share of the full model's FLOPs that it took"""
    finish: str | None
    """None | stop | length"""


@dataclass(frozen=True)
class Score:
    """What a text costs at one width."""

    nats: float
    """negative log-likelihood of the whole text, its end included"""
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else 0.0


class Model:
    """A model with its tokenizer, ready for evaluation; `load` makes one."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @property
    def config(self) -> ResolvedModel:
        """Sizes, block pattern, widths; nothing in it is left to derive."""
        return self._loaded.model.config

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the nest, ascending."""
        return tuple(row.width for row in self.config.nest or ())

    @property
    def modes(self) -> tuple[str, ...]:
        """Names for `mode`; `adaptive` is among them where the model has gates."""
        return (*self.config.modes, *(["adaptive"] if self._loaded.gates is not None else []))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def device(self) -> torch.device:
        return self._loaded.device

    def generate(self, prompt: str, **settings: Any) -> str:
        """The text that follows on the prompt; takes the settings of `stream`. Raises ConfigError."""
        return "".join(token.text for token in self.stream(prompt, **settings))

    def stream(
        self,
        prompt: str,
        *,
        mode: str = "think",
        width: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        exit_threshold: float | None = None,
        energy_price: float | None = None,
    ) -> Iterator[Token]:
        """Yields the tokens that follow on the prompt, as they are made.

        Args:
            prompt: text; a document begins with it.
            mode: a name of `modes`; `adaptive` lets the model choose widths and exits.
            width: a width of the nest instead of a mode.
            max_new_tokens: at most so many.
            temperature: 0 takes the most likely token.
            top_k: only so many of the most likely tokens; 0 turns it off.
            top_p: only the most likely tokens that make up this share; 1 turns it off.
            repetition_penalty: of tokens that came before; 1 turns it off.
            stop: strings that end the text, themselves left out.
            seed: the same one gives the same text.
            exit_threshold: of `adaptive`: confidence above which a token leaves.
            energy_price: of `adaptive`: nats that all compute is worth; None chooses widths by look-up.

        Raises ConfigError, at the first token.
        """
        given = {} if exit_threshold is None else {"exit_threshold": exit_threshold}
        try:
            count("max_new_tokens", max_new_tokens, 2**24)
            if not prompt:
                raise ConfigError("prompt: is empty; give at least one character")
            chosen = Mode(mode, width, given, energy_price)
            sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
            ids = [self.tokenizer.eod_id, *self.tokenizer.encode(clean_text(prompt))]
            request = GenerationRequest(
                tuple(ids), chosen.policy(self._loaded, ids), max_new_tokens, sampling, tuple(stop)
            )
            request.check(len(ids) + max_new_tokens)
            yield from self._tokens(request)
        except AdambaError as error:
            raise reworded(error) from None

    def _tokens(self, request: GenerationRequest) -> Iterator[Token]:
        length = len(request.prompt) + request.max_new_tokens
        generation = Generation(self._loaded, 1, length)
        meter = ComputeMeter(self.config, request.policy, length)
        news = [generation.add(request)[1]]
        while news:
            for new in news:
                share = meter.of(new.exit_layer, new.widened_at) / meter.full
                yield Token(new.token, new.text, new.exit_layer, share, new.finish)
            news = generation.step() if generation.running else []

    @naming_arguments
    @torch.no_grad()
    def score(self, text: str, *, widths: Sequence[int] | None = None, window: int = 2048) -> dict[int, Score]:
        """What the text costs as a document of its own, by width.

        Args:
            text: is scored whole, its end-of-document token too.
            widths: of the nest; all by default.
            window: tokens of one forward pass. A longer text is cut, and each piece begins without what came before.

        Raises ConfigError for a width that the nest has not.
        """
        count("window", window, 2**24)
        eod = self.tokenizer.eod_id
        ids = torch.tensor([eod, *self.tokenizer.encode(clean_text(text)), eod], device=self.device)
        num_bytes = len(text.encode("utf-8", errors="replace"))
        found = {}
        for width in self.widths if widths is None else widths:
            plan, nats = uniform_plan(self.config, width), 0.0
            for start in range(0, len(ids) - 1, window):
                piece = ids[start : start + window + 1][None]
                losses = self._loaded.model(piece[:, :-1], piece[:, 1:], None, plan, reduction="none")
                nats += losses.double().sum().item()
            found[width] = Score(nats, len(ids) - 1, num_bytes)
        return found


@naming_arguments
def load(
    path: str | Path, *, dtype: str | None = None, device: str | torch.device | None = None, verify: bool = True
) -> Model:
    """A model from a canonical folder, such as RUN/model.

    Args:
        path: the folder; it holds config.json, safetensors and the tokenizer.
        dtype: bf16 | fp32; by default bf16 where the device computes in it.
        device: a GPU where there is one by default.
        verify: holds tensors against their checksums.

    Raises CheckpointError, TokenizerError, ConfigError.
    """
    return Model(load_model(path, dtype, None if device is None else torch.device(device), verify))
