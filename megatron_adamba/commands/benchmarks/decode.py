"""Decoding: the modes of one model and its own choices beside `transformers` with the same weights; T beside M blocks.

Every sequence has a prompt; what is timed are the tokens after the first.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import mode_width
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import TOLERANCE, Row, interleaved, require_close, seconds
from megatron_adamba.commands.benchmarks.train import build_peer, copy_weights
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.plan import full_plan, uniform_plan
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.decoder import Decoder
from megatron_adamba.inference.policy import AdaptivePolicy, ComputePolicy
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.adamba import AdambaModel

EPS = 1.1920929e-7
MODES = ("ghost", "whisper", "normal", "think")
READING = GateReading("relative", 1.0)


@dataclass(frozen=True)
class Sizes:
    hidden: int
    head_dim: int
    layers: int
    vocab: int
    prompt: int
    new: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    repeats: int


FULL = Sizes(1024, 128, 8, 8192, 128, 33, (1, 16), (512, 1024, 2048, 4096, 8192), 5)
QUICK = Sizes(64, 16, 4, 64, 8, 4, (1, 2), (16, 32), 1)


def measure(quick: bool) -> list[Row]:
    """Tokens per second in bf16."""
    sizes = QUICK if quick else FULL
    rows = []
    with torch.inference_mode():
        ours = _model(sizes, "T" * sizes.layers, like_nanochat=True)
        peer = build_peer(ours.config, sizes.prompt + sizes.new + 1).eval()
        copy_weights(ours, peer)
        _compare(ours, peer, sizes, torch.float32)
        ours, peer = ours.to(torch.bfloat16), peer.to(torch.bfloat16)
        _compare(ours, peer, sizes, torch.bfloat16)
        for batch in sizes.batches:
            rows += _mode_rows(ours, peer, sizes, batch)
        rows += _context_rows(sizes)
    return rows


def _model(sizes: Sizes, pattern: str, like_nanochat: bool = False) -> AdambaModel:
    """Of a nest of eighths, quarters and halves, with weights away from their zeros at birth."""
    nanochat: dict[str, Any] = {
        "activation": "relu2",
        "qk_norm": True,
        "rope_sign": -1,
        "embedding_norm": True,
        "norm_weight": False,
        "norm_eps": EPS,
        "logit_softcap": 15.0,
    }
    config = ModelConfig(
        hidden_size=sizes.hidden,
        block_pattern=pattern,
        vocab_size=sizes.vocab,
        head_dim=sizes.head_dim,
        tie_embeddings=False,
        gate_size=64,
        widths=[sizes.hidden // share for share in (8, 4, 2, 1)],
        ffn_granule=min(64, sizes.hidden // 8),
        mamba_head_dim=min(64, sizes.hidden),
        **(nanochat if like_nanochat else {}),
    )
    model = AdambaModel(resolve_model(config)).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)
    for spec in manifest(model.config):
        if spec.init in ("output", "head"):
            parameter = model.get_parameter(spec.name)
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def _gates(config: ResolvedModel) -> Gates:
    """Untrained ones, of which each lets about a quarter of the tokens leave: what it costs, not what it is worth."""
    gates = Gates(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in gates.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.0
        parameter.data.normal_(std=3 * std if ".down." in name else std, generator=generator)
    return gates


class _OurRun:
    """A decoder that has read the prompts."""

    def __init__(self, model: AdambaModel, policy: ComputePolicy, prompts: Tensor, new: int) -> None:
        gates = _gates(model.config) if policy.adaptive is not None else None
        self.decoder = Decoder(model, prompts.shape[0], prompts.shape[1] + new, gates, READING)
        self.policy, self.prompts = policy, prompts
        self.slots = list(range(prompts.shape[0]))
        self.trace: list[tuple[Tensor, Tensor]] = []

    def read(self) -> Tensor:
        """The first token of every sequence."""
        logits = []
        for slot, prompt in enumerate(self.prompts):
            self.decoder.begin(slot, self.policy)
            logits.append(self.decoder.prefill(slot, prompt).logits)
        return torch.cat(logits).argmax(-1)

    def decode(self, tokens: Tensor, count: int) -> Tensor:
        """count further tokens; the last logits."""
        self.trace = []
        for _ in range(count):
            decoded = self.decoder.step(self.slots, tokens)
            tokens = decoded.logits.argmax(-1)
            self.trace.append((decoded.exit_layers, decoded.widened_at))
        return decoded.logits


def _prompts(sizes: Sizes, batch: int) -> Tensor:
    return torch.randint(0, sizes.vocab, (batch, sizes.prompt), generator=torch.Generator().manual_seed(2))


def _compare(ours: AdambaModel, peer: nn.Module, sizes: Sizes, dtype: torch.dtype) -> None:
    """Logits behind the prompts and behind tokens that follow, both sides with their caches."""
    prompts = _prompts(sizes, 2)
    follow = prompts[:, :3].flip(1)
    run = _OurRun(ours, ComputePolicy(full_plan(ours.config)), prompts, 4)
    run.read()
    got = [run.decoder.step(run.slots, token).logits for token in follow.t()]
    cached = peer(prompts, use_cache=True)
    for place, token in enumerate(follow.t()):
        cached = peer(token[:, None], past_key_values=cached.past_key_values, use_cache=True)
        require_close(f"logits of step {place}", got[place], cached.logits[:, -1].float(), TOLERANCE[dtype])


def _mode_rows(ours: AdambaModel, peer: Any, sizes: Sizes, batch: int) -> list[Row]:
    prompts, config = _prompts(sizes, batch), ours.config
    policies = {mode: ComputePolicy(uniform_plan(config, mode_width(config, mode))) for mode in MODES}
    policies["adaptive"] = ComputePolicy(full_plan(config), AdaptivePolicy(min_exit_layer=max(1, sizes.layers // 4)))
    runs = {mode: _OurRun(ours, policy, prompts, sizes.new) for mode, policy in policies.items()}
    count = sizes.new - 1

    def ours_takes(run: _OurRun) -> float:
        first = run.read()
        return seconds(lambda: run.decode(first, count))

    def peer_takes() -> float:
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        one = seconds(lambda: peer.generate(prompts, max_new_tokens=1, **settings))
        return seconds(lambda: peer.generate(prompts, max_new_tokens=count + 1, **settings)) - one

    taken: dict[str, list[float]] = {name: [] for name in (*runs, "peer")}
    note = lambda name, takes: taken[name].append(takes())
    sides = {name: partial(note, name, partial(ours_takes, run)) for name, run in runs.items()}
    sides["peer"] = partial(note, "peer", peer_takes)
    interleaved(sides, sizes.repeats, warmup=1)
    rates = {name: batch * count / statistics.median(times[1:]) for name, times in taken.items()}
    rows = []
    for name, run in runs.items():
        ratio = statistics.median(theirs / mine for mine, theirs in zip(taken[name][1:], taken["peer"][1:]))
        saved = f"{_saved(config, run, sizes):.0%} of the compute saved"
        compared = ratio if name == "think" else None
        rows.append(Row(f"batch {batch}, {name}, {saved}", rates[name], rates["peer"], "tokens/s", compared))
    return rows


def _saved(config: ResolvedModel, run: _OurRun, sizes: Sizes) -> float:
    meter = ComputeMeter(config, run.policy, sizes.prompt + sizes.new)
    exits, widened = (torch.cat(parts).tolist() for parts in zip(*run.trace))
    return 1 - meter.total(exits, widened) / (meter.full * len(exits))


def _context_rows(sizes: Sizes) -> list[Row]:
    """Models of T and of M blocks, two architectures: tokens per second and bytes of cache behind long contexts."""
    rows = []
    models = {letter: _model(sizes, letter * sizes.layers).to(torch.bfloat16) for letter in "MT"}
    for context in sizes.contexts:
        tokens = torch.randint(0, sizes.vocab, (1, context), generator=torch.Generator().manual_seed(3))
        runs = {}
        for letter, model in models.items():
            runs[letter] = _OurRun(
                model, ComputePolicy(full_plan(model.config)), tokens, sizes.new * (sizes.repeats + 1)
            )
            first = runs[letter].read()
        calls = {letter: lambda run=run, first=first: run.decode(first, sizes.new) for letter, run in runs.items()}
        times = interleaved(calls, sizes.repeats, warmup=1)
        m_rate, t_rate = (sizes.new / statistics.median(times[letter]) for letter in "MT")
        name = f"M over T, two models, not compared: {context} tokens"
        rows.append(Row(name, m_rate, t_rate, "tokens/s", m_rate / t_rate))
        m_bytes, t_bytes = (runs[letter].decoder.cache_bytes / 1024 for letter in "MT")
        rows.append(Row(f"{name}, cache", m_bytes, t_bytes, "KiB", t_bytes / m_bytes))
    return rows
