"""FLOPs of forward and backward with parts of a model frozen, against those that torch counts while it trains."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_adamba.blueprint.flops import block_work
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.phases import frozen_specs
from megatron_adamba.blueprint.resolve import attention_windows, mamba_inner_size, resolve_model
from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.model.adamba import AdambaModel

SEQ = 12
NEST = [NestRow(8, 5, 1, 16, 16), NestRow(20, 20, 2, 32, 16), NestRow(32, 29, 4, 96, 48)]
MAMBA = {"mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_num_groups": 2}
MODELS = {
    "TT": {},
    "swiglu, tied": {"activation": "swiglu", "tie_embeddings": True},
    "norm weights, window": {"norm_weight": True, "sliding_window": 3, "window_pattern": "SL"},
    "MTM": {**MAMBA, "mamba_use_mlp": True},
    "TMM": {**MAMBA, "mamba_use_mlp": False, "tie_embeddings": True},
    "MTM of Mamba-1": {"mamba_version": 1, "mamba_d_state": 8, "mamba_use_mlp": True},
    "EET": {"num_experts": 5, "experts_per_token": 2, "expert_ffn_size": 48, "linear_bias": True},
}
GROUPS = ("embedding", "head", "norm", "gain", "attention", "mlp", "router", "expert", "mamba")


def build(name: str) -> AdambaModel:
    pattern = name.split()[0].rstrip(",") if name[0] in "TME" else "TT"
    config = ModelConfig(
        hidden_size=32, block_pattern=pattern, vocab_size=19, head_dim=6, num_heads=8, num_kv_groups=4, ffn_size=96,
        ffn_granule=16, nest=NEST, **MODELS[name],
    )  # fmt: skip
    return AdambaModel(resolve_model(config)).initialize(0)


def part_of(name: str) -> str:
    """`blocks.1.attention`, `blocks.0.moe.experts`, `final_norm`: what freezes together here."""
    words = name.split(".")
    if words[0] != "blocks":
        return words[0]
    return ".".join(words[: 4 if words[2] == "moe" else 3])


def freeze(model: AdambaModel, names) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)


def nodes_behind(loss: torch.Tensor, kinds: tuple[str, ...]) -> int:
    """How many of the graph's nodes are of one of these kinds: their backward is going to run."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(any(kind in node.name() for kind in kinds) for node in seen)


def counted(model: AdambaModel, plan: ElasticPlan) -> tuple[int, int, int]:
    """FLOPs of products with weights, forward and backward; attentions and scans whose backward ran."""
    in_place = lambda total, left, right, *args, **kwargs: 2 * left[0] * left[1] * right[1]
    tokens = torch.zeros(1, SEQ, dtype=torch.int64)
    attentions = scans = 0
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        loss = model(tokens, tokens, plan=plan, all_take_part=False)
        if loss.requires_grad:
            attentions = nodes_behind(loss, ("ScaledDotProduct",))
            scans = nodes_behind(loss, ("_SSDScan", "_SelectiveScan"))
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    return sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_)), attentions, scans


def others(model: AdambaModel, plan: ElasticPlan, frozen, attentions: int, scans: int) -> int:
    """FLOPs per token of what is not a matrix: attention, the scan and the convolution in front of it.

    Gradients flow from the last block down to the first that needs one, so the number of backward passes says which
    blocks had theirs.
    """
    config, rows, windows = model.config, block_rows(model.config), attention_windows(model.config)
    total = 0
    reached = {"T": attentions, "E": attentions, "M": scans}
    for index in reversed(range(plan.exit_layer)):
        letter = config.block_pattern[index]
        kind = "T" if letter in "TE" else "M"
        steps = block_work(config, letter, rows[index][plan.widths[index]], windows[index], SEQ)
        (product,) = (work.flops for step in steps for work in step if work.part is None)
        backward = reached[kind] > 0
        reached[kind] -= 1
        total += product * (1 + 2 * backward)
        if letter == "M":
            channels = mamba_inner_size(config)
            if config.mamba_version == 2:
                channels += 2 * config.mamba_num_groups * config.mamba_d_state
            trains = f"blocks.{index}.mixer.conv1d.weight" not in frozen
            total += 2 * channels * config.mamba_d_conv * (1 + backward + trains)
    return total


def check(model: AdambaModel, frozen, widths: tuple[int, ...], exit_layer: int) -> int:
    freeze(model, frozen)
    plan = ElasticPlan(widths, exit_layer)
    matrices, attentions, scans = counted(model, plan)
    expected = training_costs(model.config, SEQ, frozen).of(widths, exit_layer)
    assert expected - others(model, plan, frozen, attentions, scans) == matrices / SEQ
    return matrices


def choices(model: AdambaModel) -> list[set[str]]:
    """Nothing, each group, all but each group, phase 1, and parts of blocks at random."""
    specs = manifest(model.config)
    names = {spec.name for spec in specs}
    found = [set(), {spec.name for spec in frozen_specs(specs, (), 1)}]
    for group in GROUPS:
        own = {spec.name for spec in specs if spec.group == group}
        found += [own, names - own]
    parts = sorted({part_of(name) for name in names})
    for seed in range(8):
        draw = random.Random(seed)
        trained = {part for part in parts if draw.random() < (0.15, 0.5)[seed % 2]}
        found.append({name for name in names if part_of(name) not in trained})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_torch_counts_is_what_is_expected(name):
    model = build(name)
    depth = model.config.num_layers
    seen = set()
    for frozen in choices(model):
        for widths, exit_layer in (((32,) * depth, depth), ((8, 20, 8)[:depth], depth), ((20, 32, 20)[:depth], 1)):
            seen.add(check(model, frozen, widths, exit_layer))
    assert len(seen) > 20


def test_nothing_frozen_is_three_times_the_forward_pass():
    for name in MODELS:
        model = build(name)
        every = {spec.name for spec in manifest(model.config)}
        widths = (20,) * model.config.num_layers
        whole, none = (training_costs(model.config, SEQ, frozen).of(widths) for frozen in ((), every))
        assert whole == 3 * none
