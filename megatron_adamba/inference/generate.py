"""Generation with KV and Mamba caches at a fixed plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.config.rules import in_range, positive
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.errors import ConfigError
from megatron_adamba.layers.cache import KVCache
from megatron_adamba.layers.mamba import MambaState
from megatron_adamba.model.adamba import AdambaModel


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the most likely token"""
    top_k: int = 0
    """only the k most likely; 0 turns it off"""
    top_p: float = 1.0
    """only the most likely ones that together reach this probability"""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError."""
        in_range("--temperature", self.temperature, 0, 100)
        in_range("--top-k", self.top_k, 0, 10**9)
        in_range("--top-p", self.top_p, 0, 1)


def make_caches(model: AdambaModel, plan: ElasticPlan, batch: int, capacity: int) -> list[KVCache | MambaState | None]:
    """One cache per block that runs: keys and values of the plan's KV groups, or a Mamba state."""
    config = model.config
    weight = model.embedding.weight
    caches: list[KVCache | MambaState | None] = []
    for index, block in enumerate(model.blocks):
        if index >= plan.exit_layer:
            caches.append(None)
        elif config.block_pattern[index] in "TE":
            groups = model.rows[index][plan.widths[index]].kv_groups
            caches.append(KVCache(batch, capacity, groups, config.head_dim, weight.dtype, weight.device))
        else:
            caches.append(block.mixer.new_state(batch, device=weight.device))
    return caches


def generate(
    model: AdambaModel,
    prompt: Tensor,
    plan: ElasticPlan,
    max_new_tokens: int,
    sampling: Sampling,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Yield one token per sequence, [batch], until the limit or until every sequence has produced `stop_token`.

    prompt: [batch, length] int64, at least one token. Raises ConfigError.
    """
    positive("--max-new-tokens", max_new_tokens)
    sampling.check()
    if prompt.shape[1] == 0:
        raise ConfigError("--prompt: is empty; give at least one token of text")
    generator = torch.Generator(device=prompt.device).manual_seed(sampling.seed)
    caches = make_caches(model, plan, prompt.shape[0], prompt.shape[1] + max_new_tokens)
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    tokens = prompt
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model.forward_cached(tokens, plan, caches)
        chosen = choose(logits, sampling, generator)
        yield chosen
        if stop_token is not None:
            done |= chosen == stop_token
            if bool(done.all()):
                return
        tokens = chosen.unsqueeze(1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits: [batch, vocab] fp32; returns [batch] int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        # the first token always stays, whatever the bound
        probabilities = probabilities.masked_fill((before >= sampling.top_p) & (before > 0), 0.0)
    picked = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, picked).squeeze(-1)
