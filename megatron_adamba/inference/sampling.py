"""How a token is chosen from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adamba.config.rules import check_seed, in_range, usual

COLDEST = 1e-4


@dataclass(frozen=True)
class Sampling:
    """The same seed gives the same text, whatever else runs in the batch."""

    temperature: float = 0.0
    """0 takes the most likely token"""
    top_k: int = 0
    """only the k most likely; 0 turns it off"""
    top_p: float = 1.0
    """only the most likely ones that together reach this probability"""
    repetition_penalty: float = 1.0
    """logits of tokens that occurred are divided by it where positive, else multiplied (arXiv 1909.05858, section 4.1);
    1 turns it off"""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError."""
        in_range("--temperature", self.temperature, 0, 100, usual(self, "temperature"))
        in_range("--top-k", self.top_k, 0, 10**9, usual(self, "top_k"))
        in_range("--top-p", self.top_p, 0, 1, usual(self, "top_p"))
        in_range("--repetition-penalty", self.repetition_penalty, 0.01, 100, usual(self, "repetition_penalty"))
        check_seed("--seed", self.seed)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """logits: [batch, vocab] fp32; seen: [tokens] int64 that occurred, for the penalty; returns [batch] int64."""
    if seen is not None and sampling.repetition_penalty != 1:
        there = logits[:, seen]
        penalized = torch.where(there > 0, there / sampling.repetition_penalty, there * sampling.repetition_penalty)
        logits = logits.index_copy(1, seen, penalized)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # less would be the same choice, and overflow on the way
    logits = logits / max(sampling.temperature, COLDEST)
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
