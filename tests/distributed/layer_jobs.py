"""Jobs that hold layers shared out over all ranks of a group against the same layers on one.

Each returns {what: deviation} as a share of the largest magnitude that was expected; the tests set the bounds, so that
a rank never stops alone in the middle of a job.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops import linear_cross_entropy as whole_head
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.vocab_parallel_cross_entropy import (
    VocabularyShard,
    vocab_parallel_cross_entropy,
    vocab_parallel_token_losses,
)
from megatron_adamba.parallel.layout import contiguous_rows, cut, join
from megatron_adamba.parallel.tensor import TensorParallel, tensor_parallel
from megatron_adamba.parallel.topology import RankGrid, Topology, build_topology

Deviations = dict[str, float]
NEST = [NestRow(8, 5, 1, 16), NestRow(21, 30, 3, 48), NestRow(32, 29, 4, 96)]
"""one unit in the narrowest row, which rank 0 alone owns; an odd number in the next"""


@functools.cache
def _topology(sp: bool) -> Topology:
    """Kept, as process groups live long."""
    return build_topology(RankGrid(dist.get_world_size(), tp=dist.get_world_size()), sp)


def everyone(sp: bool) -> TensorParallel:
    """All ranks of this group share every layer."""
    return tensor_parallel(_topology(sp))


ROUNDING = 1e-14
"""of float64 beside gradients of about 1"""


def deviation(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite for another shape. Over 1 for an expected zero:
    some processors miss it by the rounding of what cancels, as where one key leaves softmax nothing to move."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    scale = want.double().abs().max().item()
    scale = scale if scale > ROUNDING else 1.0
    return ((got.double() - want.double()).abs().max() / scale).item()


def of_all_ranks(tensor: Tensor) -> list[Tensor]:
    """Shapes may differ from rank to rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.detach())
    return parts


def own_part(whole: Tensor, tp: TensorParallel) -> Tensor:
    """What a rank holds of [batch, seq, ...] in the residual stream."""
    return whole.chunk(tp.size, dim=1)[tp.rank] if tp.sequence_parallel else whole


def small_config(pattern: str, **changes: Any) -> ModelConfig:
    shape = {
        "hidden_size": 32,
        "block_pattern": pattern,
        "vocab_size": 53,
        "head_dim": 6,
        "num_heads": 8,
        "num_kv_groups": 4,
        "ffn_size": 96,
        "ffn_granule": 16,
        "linear_bias": True,
        "nest": NEST,
        "static_norm_size": 23,
        "mamba_d_state": 4,
        "mamba_head_dim": 8,
        "mamba_num_groups": 1 if changes.get("mamba_version") == 1 else 2,
        "mamba_chunk_size": 4,
        "mamba_use_mlp": True,
    }
    return resolve_model(ModelConfig(**shape | changes))


def build_pair(config: ModelConfig, tp: TensorParallel, dtype: str, **options: Any) -> tuple[AdambaModel, AdambaModel]:
    """A model with nothing neutral in it, whole and this rank's shard of it."""
    whole, shard = AdambaModel(config, **options), AdambaModel(config, tp=tp, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for spec in manifest(config):
            parameter = whole.get_parameter(spec.name)
            noise = torch.randn(spec.shape, generator=generator)
            if spec.init in ("a_log_uniform", "a_log_arange", "dt_bias"):
                noise = noise.abs() - (2 if spec.init == "dt_bias" else 0)
            elif spec.init == "ones":
                noise = 1 + 0.4 * noise
            elif len(spec.shape) == 2:
                noise *= spec.shape[1] ** -0.5
            else:
                noise *= 0.3
            parameter.copy_(noise)
            shard.get_parameter(spec.name).copy_(cut(spec, noise, tp.size, tp.rank))
    for model in (whole, shard):
        model.to(getattr(torch, dtype))
    return whole, shard


def gradient_deviations(config: ModelConfig, whole: nn.Module, shard: nn.Module, prefix: str = "") -> Deviations:
    """Of every parameter below a prefix: joined from the shards, or each rank's own where it stays whole."""
    found = {}
    for spec in manifest(config):
        if not spec.name.startswith(prefix):
            continue
        want, got = (model.get_parameter(spec.name).grad for model in (whole, shard))
        parts = of_all_ranks(got if got is not None else torch.full((1, 1), torch.nan))
        if want is None:
            found[spec.name] = 0.0 if got is None else math.inf
        elif spec.unit is None:
            found[spec.name] = max(deviation(part, want) for part in parts)
        elif [part.shape for part in parts] != [cut(spec, want, len(parts), r).shape for r in range(len(parts))]:
            found[spec.name] = math.inf
        else:
            found[spec.name] = deviation(join(spec, parts), want)
    return found


def random(shape: Sequence[int], seed: int, dtype: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def documents(batch: int, seq: int) -> Tensor:
    starts = torch.rand(batch, seq, generator=torch.Generator().manual_seed(3)) < 0.2
    return starts.cumsum(1, dtype=torch.int32)


def sublayer(
    info,
    name: str,
    sp: bool,
    changes: dict[str, Any],
    dtype: str = "float64",
    batch: int = 2,
    seq: int = 6,
    packed: bool = True,
) -> Deviations:
    """A job: block 0's `name` at every width, each micro-batch by itself and then all of them added up."""
    tp = everyone(sp)
    config = small_config("M" if name.startswith("mixer") else "T", **changes)
    whole, shard = build_pair(config, tp, dtype)
    prefix, found = f"blocks.0.{name}", {}
    static = name.startswith("mixer")
    for direct in (True, False):
        for index, row in enumerate(config.nest[-1:] if static else [*config.nest, config.nest[0]]):
            width = config.hidden_size if static else row.width
            x, cotangent = random((batch, seq, width), index, dtype), random((batch, seq, width), index + 9, dtype)
            mode = Accumulation.DEFER if index < len(config.nest) else Accumulation.HAND_OVER
            mode = Accumulation.DIRECT if direct or static else mode
            outputs, gradients = [], []
            for model, form in ((whole, lambda t: t), (shard, lambda t: own_part(t, tp))):
                seq_idx = documents(batch, seq) if packed else None
                context = model.training_context(torch.zeros(batch, seq), seq_idx, mode)
                layer, mine = model.get_submodule(prefix), form(x).clone().requires_grad_()
                if name.endswith("norm"):
                    y = layer(mine)
                elif static:
                    y = layer(mine, seq_idx=seq_idx)
                else:
                    y = layer(mine, row, context)
                outputs.append(y.detach().clone())
                y.backward(form(cotangent))
                gradients.append(mine.grad)
            what = f"{mode.value} {row.width} "
            found[what + "output"] = deviation(outputs[1], own_part(outputs[0], tp))
            found[what + "input gradient"] = deviation(gradients[1], own_part(gradients[0], tp))
            if mode is not Accumulation.DEFER:
                found |= {what + name: d for name, d in gradient_deviations(config, whole, shard, prefix).items()}
                whole.zero_grad(), shard.zero_grad()
    return found


def ends(info, sp: bool, vocab: int, changes: dict[str, Any], tokens_shape=(2, 6)) -> Deviations:
    """A job: the embedding's look-up, and the head's logits, losses and token losses behind it."""
    tp = everyone(sp)
    config = small_config("T", vocab_size=vocab, **changes)
    pair = build_pair(config, tp, "float64")
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, vocab, (2, *tokens_shape), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    cotangent = random((*tokens_shape, config.hidden_size), 2, "float64")
    found, results = {}, []
    for model, form in zip(pair, (lambda t: t, lambda t: own_part(t, tp))):
        head = functools.partial(model.embedding, as_head=True) if model.head is None else model.head
        x = model.embedding(tokens)
        x.backward(form(cotangent))
        looked_up = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        h = form(cotangent).clone().requires_grad_()
        loss = head(h, labels)
        (0.7 * loss).backward()
        results.append((x.detach(), loss.detach(), head(h, labels, "none"), head(h).detach(), h.grad, looked_up))
    (x, loss, losses, logits, grad, looked_up), mine = results
    found["looked up"] = deviation(mine[0], own_part(x, tp))
    for index, (what, want) in enumerate({"loss": loss, "token losses": losses, "logits": logits}.items(), 1):
        found[what] = deviation(mine[index], want)
    found["gradient of hidden"] = deviation(mine[4], own_part(grad, tp))
    spec = manifest(config)[0]
    found["gradient of the look-up"] = deviation(join(spec, of_all_ranks(mine[5][spec.name])), looked_up[spec.name])
    return found | gradient_deviations(config, *pair)


def whole_model(
    info,
    sp: bool,
    changes: dict[str, Any],
    pattern: str = "TMT",
    plans: Sequence[Any] = (),
    seq: int = 7,
    batch: int = 2,
    dtype: str = "float64",
    recompute: bool = False,
    freeze: Sequence[str] = (),
) -> Deviations:
    """A job: loss, token losses, logits and all gradients, plan by plan; plans: (widths, exit layer)."""
    tp = everyone(sp)
    config = small_config(pattern, **changes)
    pair = build_pair(config, tp, dtype, activation_checkpointing=recompute)
    for model, spec in ((model, spec) for model in pair for spec in manifest(config)):
        model.get_parameter(spec.name).requires_grad_(spec.group not in freeze)
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, config.vocab_size, (2, batch, seq), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    found: Deviations = {}
    for widths, exit_layer in plans:
        plan, seq_idx = ElasticPlan(tuple(widths), exit_layer), documents(batch, seq)
        results = []
        for model in pair:
            loss = model(tokens, labels, seq_idx, plan)
            loss.backward()
            with torch.no_grad():
                losses = model(tokens, labels, seq_idx, plan, reduction="none")
                results.append((loss.detach(), losses, model(tokens, seq_idx=seq_idx, plan=plan)))
        for what, want, got in zip(("loss", "token losses", "logits"), *results):
            found[f"{plan.label} {what}"] = deviation(got, want)
        found |= {f"{plan.label} {name}": d for name, d in gradient_deviations(config, *pair).items()}
        for model in pair:
            model.zero_grad()
    return found


def head_cases(info, sp: bool, dtype: str, cases: Sequence[Sequence[Any]]) -> dict[str, Deviations]:
    """A job: the shared head against torch's cross entropy over the whole vocabulary in float64.

    cases: (vocabulary, softcap, batch, seq, share of labels left out, factor on the logits).
    """
    tp = everyone(sp)
    return {str(case): dict(_head_case(tp, dtype, *case)) for case in cases}


def _head_case(
    tp: TensorParallel, dtype: str, vocab: int, softcap: float, batch: int, seq: int, ignored: float, factor: float
) -> Iterator[tuple[str, float]]:
    channels = 6
    hidden, weight = random((batch, seq, channels), 0, dtype) * factor, random((vocab, channels), 1, dtype)
    generator = torch.Generator().manual_seed(vocab + seq)
    labels = torch.randint(0, vocab, (batch, seq), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100

    hidden64, weight64 = (t.to(torch.float64, copy=True).requires_grad_() for t in (hidden, weight))
    logits = hidden64 @ weight64.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    loss = each.sum() / max(1, (labels != -100).sum().item())
    (0.7 * loss).backward()

    unit = 64 if vocab >= 4096 else 1
    first, end = contiguous_rows(vocab, unit, tp.size, tp.rank)
    shard = VocabularyShard(vocab, first, tp)
    # chunks of 256 tokens, the fewest there are
    with patch.object(whole_head, "_CHUNK_ELEMENTS", 1):
        for trained in ("both", "hidden", "weight", "none"):
            mine = own_part(hidden, tp).clone().requires_grad_(trained in ("both", "hidden"))
            rows = weight[first:end].clone().requires_grad_(trained in ("both", "weight"))
            got = vocab_parallel_cross_entropy(mine, rows, labels, softcap, shard)
            yield f"{trained}: loss", deviation(got.detach(), loss.detach())
            if trained != "none":
                (0.7 * got).backward()
            if mine.requires_grad:
                yield f"{trained}: gradient of hidden", deviation(mine.grad, own_part(hidden64.grad, tp))
            if rows.requires_grad:
                joined = torch.cat(of_all_ranks(rows.grad))
                yield f"{trained}: gradient of weight", deviation(joined, weight64.grad)
        losses = vocab_parallel_token_losses(own_part(hidden, tp), weight[first:end], labels, softcap, shard)
        yield "token losses", deviation(losses, each.detach())
