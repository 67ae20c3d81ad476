"""Our models under lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md)."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from megatron_adamba.config.rules import positive
from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.items import Item, batches, mode_residual
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.text_stream import clean_text

_SAMPLING = {"top_k": int, "top_p": float, "repetition_penalty": float}
_ADAPTIVE = {"exit_threshold": float, "expand_cost": float, "min_exit_layer": int, "exit_per": str, "min_width": int}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = {**_SAMPLING, "temperature": float, **dict.fromkeys(_LENGTHS, int)}
_NEUTRAL = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1, "min_p": 0, "seed": None}
"""settings of other libraries that may be given at the value at which they change nothing"""


@register_model("adamba")
class AdambaLM(TemplateLM):
    """`--model adamba --model_args pretrained=RUN/model,mode=adaptive`.

    Scores, windows and settings of requests are those of the harness's own `HFLM`. Contexts begin behind an
    end-of-document token, as documents do in training; add_bos_token=False leaves it out.
    """

    def __init__(
        self,
        pretrained: str,
        mode: str = "think",
        width: int | None = None,
        energy_price: float | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_length: int | str = 2048,
        max_gen_toks: int | str = 256,
        add_bos_token: bool = True,
        seed: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **adaptive: Any,
    ) -> None:
        """seed: of sampled texts; None takes the one that the harness gave to torch (`--seed`). max_batch_size: is not
        needed. adaptive: fields of the adaptive policy. Raises ConfigError and what loading a model raises."""
        super().__init__()
        if unknown := sorted(set(adaptive) - set(_ADAPTIVE)):
            known = "pretrained, mode, width, energy_price, dtype, batch_size, max_length, max_gen_toks, add_bos_token"
            raise ConfigError(f"--model_args {unknown[0]}: is not known; one of {known}, seed, {', '.join(_ADAPTIVE)}")
        given = {name: _converted(name, _ADAPTIVE[name], value) for name, value in adaptive.items()}
        self.batch_size = 8 if str(batch_size).startswith("auto") else _converted("batch_size", int, batch_size)
        self._max_length = _converted("max_length", int, max_length)
        self._max_gen_toks = _converted("max_gen_toks", int, max_gen_toks)
        sizes = {"batch_size": self.batch_size, "max_length": self._max_length, "max_gen_toks": self._max_gen_toks}
        for name, value in sizes.items():
            positive(f"--model_args {name}", value)
        self.add_bos_token = add_bos_token
        self.seed = torch.initial_seed() if seed is None else _converted("seed", int, seed)
        self.loaded = load_model(pretrained, dtype, _device(device))
        price = None if energy_price is None else _converted("energy_price", float, energy_price)
        self.mode = Mode(str(mode), None if width is None else _converted("width", int, width), given, price)
        # refuses at once what cannot be
        self.mode.policy(self.loaded, [self.eot_token_id])

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eod_id

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With the end-of-document token in front, unless that is turned off here or for all."""
        front = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id] * front + self.loaded.tokenizer.encode(clean_text(string))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise ConfigError("--apply_chat_template: our models have no template; leave the flag out")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """White space at a context's end belongs to the continuation: one of nothing else is an empty one then."""
        before, behind = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], behind

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # the harness looks at the first token of a continuation behind an empty context
        kept = [request for request in requests if request.args[0] or request.args[1]]
        scores = iter(super().loglikelihood(kept, disable_tqdm=True))
        return [next(scores) if request.args[0] or request.args[1] else (0.0, True) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Long texts in the harness's own windows: each token once, those of the last window behind a full context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *pair) for pair in map(utils.make_disjoint_window, rolled)]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += score
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of (what caches know it by, context, continuation); what is too long loses the context's beginning."""
        items = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"--model_args max_length={self.max_length}: a continuation has {len(continuation)} tokens; give "
                    f"max_length={len(continuation)} or more"
                )
            kept = context[-max(self.max_length + 1 - len(continuation), 1) :]
            items.append(Item(tuple(kept), tuple(continuation)))
        scores = self._score(items)
        for (text, _, _), score in zip(requests, scores):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    @torch.no_grad()
    def _score(self, items: Sequence[Item]) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(items)
        for places, tokens in batches(items, self.batch_size):
            policies = [self.mode.policy(self.loaded, items[place].prompt) for place in places]
            x, _ = mode_residual(self.loaded, tokens.to(self.loaded.device), policies)
            for row, place in enumerate(places):
                item = items[place]
                if not item.answer:
                    continue
                logits = self.loaded.model.logits(x[row, item.first : len(item.inputs)][None])[0]
                answer = torch.tensor(item.answer, device=logits.device)
                loss = F.cross_entropy(logits, answer, reduction="sum")
                scores[place] = (-loss.item(), bool((logits.argmax(-1) == answer).all()))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Sampled texts of equal requests (`repeats`) differ; the same seed gives the same texts."""
        told: list[GenerationRequest] = []
        seen: Counter[str] = Counter()
        for request in requests:
            context, settings = request.args
            key = repr((self.seed, context, sorted(settings.items(), key=str)))
            told.append(self._request(context, settings, _seed(f"{key} {seen[key]}")))
            seen[key] += 1
        texts = []
        for start in range(0, len(told), self.batch_size):
            texts += self._generate(told[start : start + self.batch_size])
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, requests: list[GenerationRequest]) -> list[str]:
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        generation, texts = Generation(self.loaded, len(requests), longest), {}
        for request in requests:
            sequence, new = generation.add(request)
            texts[sequence.number] = new.text
        while generation.running:
            for new in generation.step():
                texts[new.number] += new.text
        return [
            postprocess_generated_text(text, list(request.stop), None)
            for request, text in zip(requests, texts.values())
        ]

    def _request(self, context: str, given: dict, seed: int) -> GenerationRequest:
        """Raises ConfigError for settings that cannot be, and where no room is left for the context."""
        settings = dict(normalize_gen_kwargs(_checked(given), self.max_gen_toks))
        most, until = settings.pop("max_gen_toks"), settings.pop("until")
        temperature = settings.pop("temperature", 0.0) if settings.pop("do_sample") else 0.0
        room = self.max_length - most
        if room < 1 or most < 1:
            raise ConfigError(
                f"max_gen_toks {most}: must be 1 or more, and leave room for a context in --model_args "
                f"max_length={self.max_length}; for example max_gen_toks={max(self.max_length // 2, 1)}"
            )
        own = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        unknown = [name for name, value in settings.items() if name not in _NEUTRAL or value != _NEUTRAL[name]]
        if unknown:
            logging.getLogger("megatron_adamba").warning("generation settings without effect: %s", ", ".join(unknown))
        prompt = tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,)
        sampling = replace(Sampling(temperature, seed=seed), **own)
        stop = tuple(text for text in until if text)
        return GenerationRequest(prompt, self.mode.policy(self.loaded, prompt), most, sampling, stop)


def _converted(name: str, kind: type, value: Any, flag: str = "--model_args") -> Any:
    """An argument as what it has to be. Raises ConfigError."""
    try:
        made = kind(value)
        # true is no 1, and 2.5 no 2
        if not isinstance(value, bool) and (kind is not int or isinstance(value, str) or made == value):
            return made
    except (TypeError, ValueError, OverflowError):
        pass
    words = {int: "a whole number", float: "a number", str: "a word"}[kind]
    raise ConfigError(f"{flag} {name}={str(value)[:100]}: must be {words}")


def _checked(given: dict) -> dict:
    """Settings of a request as what they have to be, null left out. Raises ConfigError."""
    settings = {name: value for name, value in given.items() if value is not None}
    for name, kind in _SETTINGS.items():
        if name in settings:
            settings[name] = _converted(name, kind, settings[name], "--gen_kwargs")
    until = settings.get("until", [])
    if not all(isinstance(text, str) for text in (until if isinstance(until, list) else [until])):
        raise ConfigError(f'--gen_kwargs until={str(until)[:100]}: must be a text or a list of texts, as ["\\n\\n"]')
    sampled, temperature = settings.get("do_sample"), settings.get("temperature", 0.0)
    if not isinstance(sampled, bool | None):
        raise ConfigError(f"--gen_kwargs do_sample={str(sampled)[:100]}: must be true or false")
    if not temperature >= 0 or (sampled and temperature == 0):
        rule = "do_sample needs one above 0" if sampled else "must be 0 or more"
        raise ConfigError(f"--gen_kwargs temperature={temperature}: {rule}; for example temperature=1.0")
    return settings


def _device(name: str | None) -> torch.device | None:
    """The harness asks for CUDA where nothing is asked for; None takes what is there. Raises ConfigError."""
    if name is None or (str(name).startswith("cuda") and not torch.cuda.is_available()):
        return None
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}; for example --device cpu") from None


def _seed(text: str) -> int:
    """A seed for a generator, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "little")
