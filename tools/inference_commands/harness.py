"""Our models under lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.items import Item, batches, mode_residual
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.sampling import Sampling


@register_model("adamba")
class AdambaLM(LM):
    """`--model adamba --model_args pretrained=RUN/model,mode=adaptive`; contexts begin behind an end-of-document token,
    as documents do in training."""

    def __init__(
        self,
        pretrained: str,
        mode: str = "think",
        width: int | None = None,
        energy_price: float | None = None,
        dtype: str = "bf16",
        batch_size: int | str = 8,
        max_length: int | str = 2048,
        max_gen_toks: int | str = 256,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.loaded = load_model(pretrained, dtype)
        self.mode = Mode(mode, width if width is None else int(width), energy_price=energy_price)
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.max_length, self.max_gen_toks = int(max_length), int(max_gen_toks)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._score([self._item(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Long texts in windows that do not overlap, each behind the token before it."""
        tokenizer, totals = self.loaded.tokenizer, []
        for request in requests:
            ids = [tokenizer.eod_id, *tokenizer.encode(request.args[0])]
            starts = range(0, len(ids) - 1, self.max_length)
            pieces = [ids[start : start + self.max_length + 1] for start in starts]
            scores = self._score([Item(tuple(piece[:1]), tuple(piece[1:])) for piece in pieces])
            totals.append(sum(score for score, _ in scores))
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts = []
        for start in range(0, len(requests), self.batch_size):
            texts += self._generate([request.args for request in requests[start : start + self.batch_size]])
        return texts

    def _item(self, context: str, continuation: str) -> Item:
        """Spaces at the end of a context belong to the continuation, whose tokens they are part of."""
        tokenizer = self.loaded.tokenizer
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        prompt = tokenizer.encode(kept)
        whole = tokenizer.encode(kept + continuation)
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode(continuation)
        room = max(self.max_length - len(answer), 0)
        return Item((tokenizer.eod_id, *prompt[len(prompt) - min(room, len(prompt)) :]), tuple(answer))

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

    def _generate(self, arguments: list[tuple[str, dict]]) -> list[str]:
        requests = [self._request(context, settings) for context, settings in arguments]
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        generation, texts = Generation(self.loaded, len(requests), longest), {}
        for request in requests:
            sequence, new = generation.add(request)
            texts[sequence.number] = new.text
        while generation.running:
            for new in generation.step():
                texts[new.number] += new.text
        return list(texts.values())

    def _request(self, context: str, settings: dict) -> GenerationRequest:
        tokenizer = self.loaded.tokenizer
        most = int(settings.get("max_gen_toks", self.max_gen_toks))
        ids = tokenizer.encode(context)
        room = max(self.max_length - most, 1)
        prompt = (tokenizer.eod_id, *ids[-room:])
        until = settings.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        sampling = Sampling(temperature, int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0)))
        return GenerationRequest(prompt, self.mode.policy(self.loaded, prompt), most, sampling, stop)
