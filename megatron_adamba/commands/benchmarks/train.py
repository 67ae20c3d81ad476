"""Training throughput of a model configured like nanochat, beside `transformers`' NanoChat with the same weights."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import (
    TOLERANCE,
    Row,
    gradient_of,
    interleaved,
    matmul_rate,
    require_close,
    require_small_error,
    time_row,
)
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.engine.optimizer import ElasticOptimizer, parameter_groups
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.host_memory import keep_freed_pages
from megatron_adamba.parallel.topology import single_process

EPS = 1.1920929e-7
PLACES = {
    "attention.qkv.q_weight": "self_attn.q_proj",
    "attention.qkv.k_weight": "self_attn.k_proj",
    "attention.qkv.v_weight": "self_attn.v_proj",
    "attention.out.o_weight": "self_attn.o_proj",
    "mlp.up.up_weight": "mlp.fc1",
    "mlp.down.down_weight": "mlp.fc2",
}
"""where transformers keeps the weights of a block"""


def measure(quick: bool) -> list[Row]:
    """Tokens per second and MFU of forward + backward in bf16; the optimizer step apart."""
    hidden, head_dim, layers, vocab, batch, seq = (32, 8, 2, 64, 2, 16) if quick else (1024, 128, 4, 8192, 4, 512)
    repeats, matmul_size = (2, 128) if quick else (10, 2048)
    dtype = torch.bfloat16
    ours = build_ours(hidden, head_dim, layers, vocab)
    peer = build_peer(ours.config, seq)
    copy_weights(ours, peer)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, vocab, (2, batch, seq), generator=generator)
    # exactly in fp32, on one sequence, and then as it is timed
    _compare(ours, peer, tokens[:1], labels[:1], TOLERANCE[torch.float32])
    ours, peer = ours.to(dtype), peer.to(dtype)
    _compare(ours, peer, tokens, labels, TOLERANCE[dtype])

    # what training does at its start; the setting is the process's, so the peer has it too
    keep_freed_pages()
    optimizers = {
        "ours": _our_optimizer(ours),
        "peer": torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True),
    }
    rate = matmul_rate(dtype, matmul_size)
    passes = {"ours": lambda: our_loss(ours, tokens, labels), "peer": lambda: peer_loss(peer, tokens, labels)}
    backward = lambda loss: loss().backward()
    times = interleaved({name: partial(backward, loss) for name, loss in passes.items()}, repeats)
    steps = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, repeats)
    return _rows(ours.config, batch, seq, times, steps, rate)


def build_ours(hidden: int, head_dim: int, layers: int, vocab: int) -> AdambaModel:
    """Our model with nanochat's choices, its output projections and head away from their zeros at birth."""
    config = resolve_model(
        ModelConfig(
            hidden_size=hidden,
            num_layers=layers,
            vocab_size=vocab,
            head_dim=head_dim,
            activation="relu2",
            qk_norm=True,
            rope_sign=-1,
            embedding_norm=True,
            norm_weight=False,
            norm_eps=EPS,
            tie_embeddings=False,
            logit_softcap=15.0,
        )
    )
    model = AdambaModel(config).initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for spec in manifest(config):
            if spec.init in ("output", "head"):
                parameter = model.get_parameter(spec.name)
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def build_peer(config: ResolvedModel, seq: int) -> nn.Module:
    """transformers' NanoChat of the same sizes, uninitialised as far as we care."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    # transformers' types leave it out
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}
    return NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_groups,
            max_position_embeddings=seq,
            rms_norm_eps=EPS,
            final_logit_softcapping=config.logit_softcap,
            **attention,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def peer_place(name: str) -> str | None:
    """The peer's name of one of our parameters, None for gains, which it does not have."""
    if name.endswith("gain"):
        return None
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        return f"model.layers.{index}.{PLACES[rest]}.weight"
    return {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[name]


@torch.no_grad()
def copy_weights(ours: AdambaModel, peer: nn.Module) -> None:
    """Give the peer our weights, every one of its parameters."""
    places = {peer_place(name): parameter for name, parameter in ours.named_parameters()}
    for name, parameter in peer.named_parameters():
        parameter.copy_(places[name])


def our_loss(model: AdambaModel, tokens: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    return model(tokens, labels)


def peer_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    return model(tokens, labels=labels, shift_labels=labels, use_cache=False).loss


def _our_optimizer(model: AdambaModel) -> ElasticOptimizer:
    config = OptimizerConfig(lr=1e-6)
    return ElasticOptimizer(
        parameter_groups(model, manifest(model.config), config), config, torch.bfloat16, single_process()
    )


def _compare(ours: AdambaModel, peer: nn.Module, tokens: Tensor, labels: Tensor, bound: float) -> None:
    """Logits and loss, and the gradient of every weight by its norm: in bf16 each side rounds in its own places."""
    with torch.no_grad():
        require_close("logits", ours(tokens), peer(tokens, use_cache=False).logits, bound)
    losses = our_loss(ours, tokens, labels), peer_loss(peer, tokens, labels)
    require_close("loss", losses[0].detach(), losses[1].detach(), bound)
    torch.autograd.backward(losses)
    for name, parameter in ours.named_parameters():
        place = peer_place(name)
        if place is not None:
            grads = gradient_of(parameter), gradient_of(peer.get_parameter(place))
            require_small_error(f"gradient of {name}", *grads, 2 * bound)


def flops_per_token(config: ResolvedModel, seq: int) -> float:
    """Of forward + backward: 6 for each weight of a matmul, and causal attention's two products."""
    matmuls = sum(spec.numel for spec in manifest(config) if spec.kind == "matrix" or spec.name == "head.weight")
    return 6 * (matmuls + config.num_layers * config.num_heads * config.head_dim * seq)


def _rows(config: ResolvedModel, batch: int, seq: int, times, steps, rate: float) -> list[Row]:
    tokens = batch * seq
    speed = {name: tokens / statistics.median(values) for name, values in times.items()}
    share = {name: 100 * flops_per_token(config, seq) * value / rate for name, value in speed.items()}
    forward = time_row("forward + backward", times["ours"], times["peer"])
    return [
        Row("bf16 training throughput vs NanoChatForCausalLM", speed["ours"], speed["peer"], "tokens/s", forward.ratio),
        Row("bf16 MFU against the matmul rate", share["ours"], share["peer"], "%", forward.ratio),
        Row("bf16 matmul rate", rate / 1e9, None, "GFLOP/s", None),
        time_row("bf16 optimizer step", steps["ours"], steps["peer"], compared=False),
    ]
