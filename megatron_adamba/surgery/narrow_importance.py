"""How much each unit of a model says where channels are few: what its removal would cost a narrow width, to first
order.

Importance at full width is a poor guide to narrow ones. Here the model runs with a narrow width's channels, but with
all of its units, and a unit counts by sum |a * dL/da| over its activations (arXiv 1906.10771, eq. 8, of activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.data.loader import MicroBatch
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.layers.moe.experts import Experts
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.activation import clamped_swiglu
from megatron_adamba.surgery.importance import Importance

Caught = tuple[str, int, Tensor, Callable[[Tensor], Tensor]]
"""kind, block, an activation, and what its gradient says of the units"""


def measure_narrow(model: AdambaModel, batches: Iterable[MicroBatch]) -> Importance:
    """Heads and FFN rows, a mean over the widths below the largest; of E blocks the rows inside each expert. Channels
    and experts are left out (`hidden` is zero)."""
    config = model.config
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # the stream asks for a gradient from the embedding on, and no weight gets one
    weights["embedding.weight"] = weights["embedding.weight"].clone().requires_grad_()
    wide = AdambaModel(_with_all_units(config), device="meta").requires_grad_(False)
    sums: dict[tuple[int, str, int], Tensor] = {}
    caught: list[Caught] = []
    handles = [hook for name, module in wide.named_modules() for hook in _watch(name, module, caught, config)]
    for batch in batches:
        seq_idx = batch["seq_idx"] if batch["packed"] else None
        for width in config.widths[:-1]:
            caught.clear()
            plan = uniform_plan(wide.config, width)
            loss = functional_call(wide, weights, (batch["tokens"], batch["labels"], seq_idx, plan))
            grads = torch.autograd.grad(loss, [activation for _, _, activation, _ in caught])
            for (kind, block, _, score), grad in zip(caught, grads):
                key = (width, kind, block)
                sums[key] = sums.get(key, 0) + score(grad)
    for handle in handles:
        handle.remove()
    result = Importance(torch.zeros(config.hidden_size))
    for (_, kind, block), total in sums.items():
        # each width says as much as any other
        found = getattr(result, kind)
        found[block] = found.get(block, 0) + total / total.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return result


def _with_all_units(config: ResolvedModel) -> ResolvedModel:
    widest = config.nest[-1]
    units = {"kv_groups": widest.kv_groups, "ffn": widest.ffn, "expert_ffn": widest.expert_ffn}
    return replace(config, nest=[replace(row, **units) for row in config.nest])


def _watch(name: str, module: nn.Module, caught: list[Caught], config: ResolvedModel) -> list:
    """Hooks that only look."""
    block = int(name.split(".")[1]) if name.startswith("blocks.") else -1

    def catch(kind: str, x: Tensor, shape: tuple[int, ...]) -> None:
        caught.append((kind, block, x, lambda grad: _score(x.detach(), grad, shape)))

    if name.endswith("attention.out"):
        shape = (config.num_kv_groups, -1, config.head_dim)
        return [module.register_forward_pre_hook(lambda _, given: catch("heads", given[0], shape))]
    if name.endswith("mlp.down"):
        return [module.register_forward_pre_hook(lambda _, given: catch("ffn", given[0], (-1, 1)))]
    if isinstance(module, Experts):
        look = lambda experts, given, out: caught.append(("ffn", block, out, _expert_score(experts, given)))
        return [module.register_forward_hook(look)]
    return []


def _score(x: Tensor, grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x: [batch, seq, channels], viewed as `shape`, whose last axis is one unit's channels."""
    effect = (x.float() * grad.float()).flatten(0, -2)
    return effect.view(len(effect), *shape).sum(-1).abs().sum(0)


def _expert_score(experts: Experts, given: tuple) -> Callable[[Tensor], Tensor]:
    """given: x [n, w] by expert, routing weights [n], counts [experts]. The inner activations are computed again."""
    x, weights, counts = (part.detach() for part in given[:3])
    width, sizes, limits = x.shape[1], counts.tolist(), (experts.limit, experts.slope)
    # the module holds its weights only while the model runs
    gates, ups, gate_biases, up_biases, downs = (
        experts.gate_weight, experts.up_weight, experts.gate_bias, experts.up_bias, experts.down_weight
    )  # fmt: skip

    def score(grad: Tensor) -> Tensor:
        rows = []
        parts = zip(x.split(sizes), weights.split(sizes), grad.split(sizes))
        for expert, (own, weight, back) in enumerate(parts):
            gate = own @ gates[expert][:, :width].t() + gate_biases[expert]
            up = own @ ups[expert][:, :width].t() + up_biases[expert]
            down = (weight[:, None] * back) @ downs[expert][:width]
            rows.append((clamped_swiglu(gate, up, *limits) * down).abs().sum(0))
        return torch.stack(rows)

    return score
